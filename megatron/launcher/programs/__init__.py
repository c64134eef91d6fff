"""What ranks run: a file for each program, which deepy.py finds by name. The project's folder has a script for each."""
