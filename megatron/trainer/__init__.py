"""A training run: `run` is the page to read first; schedule, batches, saves and metrics are what it drives."""
