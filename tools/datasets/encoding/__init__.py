"""From records to token files, on all cores."""
