"""Readers and writers of file formats, byte for byte, without torch."""
