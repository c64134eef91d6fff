"""Vectors of texts: pooled hidden states of any layer, at any layout."""
