"""Evaluate a model's vectors: retrieval of documents by their halves, and linear probes of properties."""
