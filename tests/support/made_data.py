"""Invented indexed data in which every token identifies its document and position, and runs that read it."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import IndexedWriter
from megatron.neox_arguments import NeoXArgs
from tests.support.configurations import data_args


def write(prefix: Path, documents: list[np.ndarray]) -> str:
    writer = IndexedWriter(prefix, np.dtype(np.int32))
    for document in documents:
        writer.add(document)
    writer.finish()
    return str(prefix)


def numbered(lengths: list[int], first: int = 0) -> list[np.ndarray]:
    """Documents whose tokens are all different: each identifies its document and position."""
    starts = np.cumsum([first, *lengths])
    return [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]


LENGTHS = [7, 31, 2, 90, 1, 0, 13, 55, 24, 40]
S = 16  # tokens of a sample, as in `data_args`


def blend_args(tmp_path: Path, **changes: Any) -> NeoXArgs:
    """A run over two training sources, 3 to 1, with two validation sources, all written to `tmp_path`."""
    a = write(tmp_path / "a", numbered([30] * 40))
    b = write(tmp_path / "b", numbered([25] * 20, first=100_000))
    v = write(tmp_path / "v", numbered([25] * 6, first=200_000))
    paths = {"train_data_paths": [a, b], "train_data_weights": [3, 1], "valid_data_paths": [v, b]}
    return data_args(**paths | changes)
