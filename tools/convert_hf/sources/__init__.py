"""Checkpoints that can be read: Hugging Face, Meta, GPT-NeoX."""
