"""Opening checkpoints: Hugging Face, Meta, GPT-NeoX."""
