"""The `.bin/.idx` pair of Megatron, GPT-NeoX and megatron-core: tokens of all documents, and where each document lies.

`.bin` is nothing but tokens. `.idx` is, little-endian: `MMIDIDX\\0\\0`, version 1 (u64), dtype code (u8), number of
sequences n (u64), number of document marks d (u64), sizes (int32[n]), byte offsets (int64[n]), document marks
(int64[d]). As in GPT-NeoX one sequence is one document here and the marks are 0..n.

Reading and writing do not use megatron-core's classes (with which the tests compare them) for three reasons. Importing
megatron-core takes four seconds, and the data commands start in a fifth of a second. Its builder keeps every document's
length as a Python object and cannot resume after a kill; this writer's memory does not grow. Its reader says little
about a truncated file; this one names the fault before the first token is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.common.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, type[np.integer] | type[np.floating]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    7: np.float32,  # images alone
    8: np.uint16,
}
_CODE_OF = {np.dtype(kind): code for code, kind in CODES.items()}
_COPY_ITEMS = 1 << 20


class DataError(UserError, ValueError):
    """Data that cannot be used; the message names the file, what was expected and what to do."""


def token_dtype(vocab_size: int) -> np.dtype:
    """GPT-NeoX's and megatron-core's rule for the stored integer."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedFile:
    """Read access to one pair. `sizes[i]` is the number of tokens of document i."""

    def __init__(self, prefix: str | Path) -> None:
        """Raises DataError for a missing, truncated or foreign file. Reads little more than the header."""
        self.prefix = str(prefix)
        idx, binary = idx_path(prefix), bin_path(prefix)
        for path in (idx, binary):
            if not path.is_file():
                hint = f"; give the path without its ending: {Path(self.prefix).with_suffix('')}"
                raise DataError(
                    f"{path}: no such file, data {self.prefix} needs a .bin and an .idx"
                    + (hint if self.prefix.endswith((".bin", ".idx")) else "")
                )
        with idx.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise DataError(f"{idx}: {len(head)} bytes, shorter than an index header; preprocess the data again")
        # The header, and the size of the index that follows from it.
        magic, version, code, self.documents, marks = HEADER.unpack(head)
        if magic != MAGIC or version != 1:
            raise DataError(f"{idx}: not an index of the mmap format (data_impl: mmap), it begins {head[:9]!r}")
        if code not in CODES:
            raise DataError(f"{idx}: dtype code {code} is not supported; expected one of {sorted(CODES)}")
        self.dtype = np.dtype(CODES[code])
        expected = HEADER.size + 12 * self.documents + 8 * marks
        if idx.stat().st_size != expected:
            raise DataError(
                f"{idx}: {idx.stat().st_size} bytes where its header promises {expected} "
                f"({self.documents} documents); the file is truncated or foreign, copy or preprocess it again"
            )
        if self.documents == 0:
            raise DataError(f"{idx}: no documents")
        raw = np.memmap(idx, mode="r", dtype=np.uint8)
        n = self.documents
        self.sizes: NDArray[np.int32] = raw[HEADER.size :][: 4 * n].view(np.int32)
        self.offsets: NDArray[np.int64] = raw[HEADER.size + 4 * n :][: 8 * n].view(np.int64)
        self.num_tokens = int(self.offsets[-1]) // self.dtype.itemsize + int(self.sizes[-1])
        # The index determines the size of the token file.
        size = binary.stat().st_size
        if size != self.num_tokens * self.dtype.itemsize:
            raise DataError(
                f"{binary}: {size} bytes where {idx.name} promises {self.num_tokens * self.dtype.itemsize} "
                f"({self.num_tokens} {self.dtype} tokens); one of the two is truncated or from another run, "
                f"copy or preprocess them again"
            )
        self._tokens: NDArray[np.integer] = (
            np.memmap(binary, mode="r", dtype=self.dtype) if size else np.empty(0, self.dtype)
        )

    def __len__(self) -> int:
        return self.documents

    def document(self, index: int, start: int = 0, length: int | None = None) -> NDArray[np.integer]:
        """Tokens `start : start + length` of a document, a view of the mapped file."""
        begin = int(self.offsets[index]) // self.dtype.itemsize + start
        count = int(self.sizes[index]) - start if length is None else length
        return self._tokens[begin : begin + count]

    def stretch(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens `start : stop` of the file, across documents."""
        return self._tokens[start:stop]

    def __iter__(self) -> Iterator[NDArray[np.integer]]:
        return (self.document(i) for i in range(self.documents))

    def check_offsets(self) -> None:
        """Read the whole index and raise DataError unless the documents are contiguous."""
        ends = np.cumsum(self.sizes, dtype=np.int64) * self.dtype.itemsize
        if not np.array_equal(ends[:-1], self.offsets[1:]) or self.offsets[0] != 0 or (self.sizes < 0).any():
            raise DataError(f"{idx_path(self.prefix)}: offsets and sizes disagree; preprocess the data again")


@lru_cache(maxsize=64)
def open_indexed(prefix: str) -> IndexedFile:
    """A shared IndexedFile. At most 64 pairs stay open, so a blend of a thousand sources needs few file handles."""
    return IndexedFile(prefix)


class IndexedWriter:
    """Appends documents to `{path}.bin` and their sizes to `{path}.sizes`; `finish` builds the index from them.

    Both files only ever grow, so that after a kill they can be cut back to a known length and continued:
    `IndexedWriter(path, dtype, resume=(bytes, documents))`.
    """

    def __init__(self, path: Path, dtype: np.dtype, resume: tuple[int, int] = (0, 0)) -> None:
        self.bin = bin_path(path)
        self.idx = idx_path(path)
        self.dtype = dtype
        self._sizes = Path(f"{path}.sizes")
        self.bytes, self.documents = resume
        mode = "r+b" if self.bytes or self.documents else "wb"
        self._bin_file = self.bin.open(mode)
        self._sizes_file = self._sizes.open(mode)
        for file, length in ((self._bin_file, self.bytes), (self._sizes_file, 4 * self.documents)):
            if os.fstat(file.fileno()).st_size < length:
                raise DataError(f"{file.name}: shorter than its journal says; remove the partial files and start again")
            file.truncate(length)
            file.seek(length)

    def append(self, tokens: bytes, sizes: NDArray[np.int32]) -> None:
        """Add documents: their tokens as `dtype` bytes back to back, and how many tokens each has."""
        self._bin_file.write(tokens)
        self.appended(len(tokens), sizes)

    def appended(self, nbytes: int, sizes: NDArray[np.int32]) -> None:
        """Add documents whose tokens are in the `.bin` already: other processes have written them through `fileno`."""
        self._sizes_file.write(sizes.tobytes())
        self.bytes += nbytes
        self.documents += len(sizes)

    def fileno(self) -> int:
        """File descriptor of the open `.bin`."""
        return self._bin_file.fileno()

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Add one document."""
        self.append(tokens.astype(self.dtype).tobytes(), np.array([len(tokens)], np.int32))

    def sync(self) -> None:
        """Flush everything appended so far to the disk."""
        for file in (self._bin_file, self._sizes_file):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the index, sync and close. Memory use does not depend on the number of documents."""
        self.sync()
        self._bin_file.close()
        self._sizes_file.close()
        sizes = np.memmap(self._sizes, mode="r", dtype=np.int32) if self.documents else np.empty(0, np.int32)
        n = self.documents
        with self.idx.open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, _CODE_OF[self.dtype], n, n + 1))
            for start in range(0, n, _COPY_ITEMS):
                file.write(sizes[start : start + _COPY_ITEMS].tobytes())
            offset = 0
            for start in range(0, n, _COPY_ITEMS):
                ends = np.cumsum(sizes[start : start + _COPY_ITEMS], dtype=np.int64) * self.dtype.itemsize + offset
                file.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
                offset = int(ends[-1])
            for start in range(0, n + 1, _COPY_ITEMS):
                file.write(np.arange(start, min(start + _COPY_ITEMS, n + 1), dtype=np.int64).tobytes())
            file.flush()
            os.fsync(file.fileno())
        del sizes
        self._sizes.unlink()
