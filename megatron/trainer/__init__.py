"""A training run: read `run` first; it drives schedule, batches, saves and metrics."""
