"""Document cleaning for clean_corpus.py."""
