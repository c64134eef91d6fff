"""Reports of training runs: one self-contained page, and a PNG of each figure."""
