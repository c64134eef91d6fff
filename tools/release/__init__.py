"""Releases that can be checked: export, model card, provenance, and their verification on another machine."""
