"""Small token files of random documents, as input of runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron.data.indexed import IndexedWriter


def random_documents(prefix: Path, vocab: int, documents: int = 60, lengths: tuple[int, int] = (5, 60)) -> str:
    """Write `documents` documents of random ids below `vocab`, always the same; returns the prefix for a run."""
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    rng = np.random.RandomState(0)
    for _ in range(documents):
        writer.add(rng.randint(vocab, size=rng.randint(*lengths)))
    writer.finish()
    return str(prefix)
