"""Verifiable releases: export, model card and provenance, and verification on another machine."""
