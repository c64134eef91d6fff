"""File formats, byte for byte, without torch."""
