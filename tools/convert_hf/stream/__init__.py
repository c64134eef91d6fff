"""From a plan of byte ranges to files, in bounded memory."""
