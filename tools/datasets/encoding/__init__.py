"""Encodes records into token files, on all cores."""
