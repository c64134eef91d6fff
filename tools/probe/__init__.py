"""What the vectors of a model know: retrieval of documents by their halves, and probes of properties."""
