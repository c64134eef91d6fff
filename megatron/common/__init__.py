"""Utilities for every package: user errors, atomic files, processes. Standard library only."""
