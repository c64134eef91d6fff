"""Evaluation of a checkpoint: perplexity by source and document, lm-eval's tasks, multiple choice, embeddings."""
