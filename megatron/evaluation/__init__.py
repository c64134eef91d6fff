"""Loss and perplexity of a checkpoint, source by source."""
