"""Images from files of many kinds into the `.bin/.idx` form: readers, decoding in workers, the import itself."""
