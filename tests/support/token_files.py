"""Small token files of random documents, for runs that need something to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron.data.indexed import IndexedWriter


def random_documents(prefix: Path, vocab: int, documents: int = 60, lengths: tuple[int, int] = (5, 60)) -> str:
    """Write `documents` of random ids below `vocab`, the same every time; returns the prefix as a run takes it."""
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    rng = np.random.RandomState(0)
    for _ in range(documents):
        writer.add(rng.randint(vocab, size=rng.randint(*lengths)))
    writer.finish()
    return str(prefix)
