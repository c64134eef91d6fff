"""Whether two checkpoints are the same model, and the cause if they are not."""
