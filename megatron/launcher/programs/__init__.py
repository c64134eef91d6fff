"""The programs that ranks run, a file each, which deepy.py finds by name; the project's root has a script for each."""
