"""Embeddings of texts and images: pooled hidden states of any layer, at any layout."""
