"""Plan and copy byte ranges of tensors between files, in bounded memory."""
