"""Imports images from files of many kinds into `.bin/.idx`: readers, decoding in workers, the import itself."""
