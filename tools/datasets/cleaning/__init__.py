"""What clean_corpus.py does to a document."""
