"""Verifiable releases: export, model card, provenance, and their verification on another machine."""
