"""Finding the questions of a benchmark in a corpus."""
