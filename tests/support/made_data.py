"""Made-up indexed data whose every token tells its document and place, and the keys that read it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron.data.indexed import IndexedWriter


@dataclass
class Args:
    """The keys that data reads, as NeoXArgs has them."""

    data_path: str | None = None
    split: str = "8,1,1"
    train_data_paths: Sequence[str | Any] | None = None
    valid_data_paths: list[str] | None = None
    test_data_paths: list[str] | None = None
    train_label_data_paths: list[str] | None = None
    valid_label_data_paths: list[str] | None = None
    test_label_data_paths: list[str] | None = None
    train_data_weights: list[float] | None = None
    tokenizer_type: str = "HFTokenizer"
    vocab_file: str | None = None
    vocab_size: int | None = 1024
    seq_length: int = 16
    seed: int = 1234
    eod_mask_loss: bool = False
    isolate_documents: bool = False
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked", "best_fit"] = "packed"
    allow_chopped: bool = True
    train_iters: int | None = 20
    train_epochs: float | None = None
    train_batch_size: int = 8
    skip_sample_ranges: list[list[int]] = field(default_factory=list)


def write(prefix: Path, documents: list[np.ndarray]) -> str:
    writer = IndexedWriter(prefix, np.dtype(np.int32))
    for document in documents:
        writer.add(document)
    writer.finish()
    return str(prefix)


def numbered(lengths: list[int], first: int = 0) -> list[np.ndarray]:
    """Documents whose tokens are all different: each tells its document and place."""
    starts = np.cumsum([first, *lengths])
    return [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]


LENGTHS = [7, 31, 2, 90, 1, 0, 13, 55, 24, 40]


S = 16


def blend_args(tmp_path: Path, **changes: object) -> Args:
    a = write(tmp_path / "a", numbered([30] * 40))
    b = write(tmp_path / "b", numbered([25] * 20, first=100_000))
    v = write(tmp_path / "v", numbered([25] * 6, first=200_000))
    args = Args(train_data_paths=[a, b], train_data_weights=[3, 1], valid_data_paths=[v, b], vocab_size=None)
    for key, value in changes.items():
        setattr(args, key, value)
    return args
