"""Finds ids outside the vocabulary before a run starts; later, an embedding fails or returns garbage.

The header of data made by this project records its largest id. Other data, and label files, are read once; the result
is cached with their indices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from megatron.data.header import fingerprint
from megatron.data.index_cache import Arrays, CachedIndex
from megatron.data.indexed import DataError, IndexedFile, bin_path, open_indexed
from megatron.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_CHUNK = 1 << 24  # tokens
_LARGE = 1_000_000_000  # bytes; reading a larger file is logged


def scan_ids(file: IndexedFile, progress: Callable[[int], None] | None = None) -> tuple[int, int, int]:
    """(smallest id, largest id, document where that first occurs) of a file; reads all of it."""
    least, most, place = 0, -1, 0
    for start in range(0, file.num_tokens, _CHUNK):
        part = file.stretch(start, start + _CHUNK)
        smallest, largest = int(part.min()), int(part.max())
        least = min(least, smallest)
        if largest > most:
            most, place = largest, start + int(part.argmax())
        if progress is not None:
            progress(part.nbytes)
    return least, most, int(np.searchsorted(file.offsets, place * file.dtype.itemsize, side="right")) - 1


def known_ids(prefix: str) -> tuple[int, int, int]:
    """`scan_ids` of a file, from the cache if it has been read before."""

    def build() -> Arrays:
        size = bin_path(prefix).stat().st_size
        if size > _LARGE:
            logger.info(
                "%s: reading %.1f GB once, for ids outside the vocabulary; tools/datasets/build_indices.py does so "
                "before a job starts",
                prefix,
                size / 1e9,
            )
        return {"range": np.array(scan_ids(open_indexed(prefix)), np.int64)}

    written = {key: fingerprint(prefix)[key] for key in ("content", "written")}
    least, most, document = CachedIndex(prefix, "ids", {"use": "ids", **written}, build).arrays()["range"].tolist()
    return least, most, document


def refuse_outside(prefix: str, least: int, most: int, document: int, vocab_size: int, *, labels: bool = False) -> None:
    """Raise DataError for ids that the model has no row for; a negative label marks a token that is not learned."""
    if most >= vocab_size:
        raise DataError(
            f"{prefix}: token id {most} in document {document}; the model has only the ids 0 to {vocab_size - 1} "
            f"(vocab_size {vocab_size}). Preprocess the data with the model's tokenizer, or correct vocab_size"
        )
    if least < 0 and not labels:
        raise DataError(f"{prefix}: token id {least}, which is negative; the file is damaged or not a token file")


def refuse_special_outside(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError if an id that pads or frames samples is outside the model's vocabulary."""
    for name, index in (("pad", tokenizer.pad), ("end-of-document", tokenizer.eod), ("begin-of-text", tokenizer.bos)):
        if index is not None and index >= vocab_size:
            raise DataError(
                f"{tokenizer.path}: the {name} token has id {index}; the model has only the ids 0 to {vocab_size - 1} "
                f"(vocab_size {vocab_size}). Give the model's own tokenizer as vocab_file, or correct vocab_size"
            )
