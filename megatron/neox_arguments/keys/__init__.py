"""The keys by group."""
