"""Verifies checksums while loading: threads checksum the bytes that the load reads anyway.

Idle cores checksum a file from front to back while the load reads it. Whichever comes first brings a page into the page
cache, so the file is read from disk once; both release the interpreter lock, so the checksum hides behind the read.
`benchmarks/loading.py` measures it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.manifest import FileEntry, format_checksum
from megatron.checkpoint.torch_files import tensor_checksum
from megatron.common.crc import combine, crc32
from megatron.common.errors import CheckpointError, one_line

_CHUNK = 1 << 22  # bytes that a thread takes at once
_BUFFER = 1 << 18  # bytes; stays in a core's cache between the read and the checksum


@contextlib.contextmanager
def verified(path: Path, entry: FileEntry | None) -> Iterator[None]:
    """Compare `path` with the manifest's `entry` while the body reads it; CheckpointError at the end if they differ.

    The body must not act on what it has read: it is known to be right only afterwards. An error of the body is raised
    as it is, unless the file is damaged, which explains it. Without an entry or a checksum of the whole file nothing is
    compared.
    """
    if entry is None or entry.checksum is None:
        yield
        return
    summed = _Sum(path)
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    found = summed.result()
    if found != entry.checksum:
        also = f" (reading it: {one_line(failure)})" if failure is not None else ""
        raise CheckpointError(damage(path, found, entry.checksum) + also) from failure
    if failure is not None:
        raise failure


@contextlib.contextmanager
def verified_tensors(path: Path, entry: FileEntry | None, stored: Mapping[str, Tensor]) -> Iterator[None]:
    """`verified` for a layer file with mapped tensors `stored`, whose entry may only have checksums of tensors."""
    if entry is None or entry.checksum is not None:
        with verified(path, entry):
            yield
        return
    with ThreadPoolExecutor(summing_threads(), "checksum") as pool:
        sums = {name: pool.submit(tensor_checksum, stored[name]) for name in entry.tensors if name in stored}
        yield
        for name, future in sums.items():
            found, listed = future.result(), entry.tensors[name].checksum
            if found != listed:
                raise CheckpointError(damage(path, found, listed, name))


def damage(path: Path, found: str, listed: str, tensor: str = "") -> str:
    where = f"the bytes of {tensor} have" if tensor else "its bytes have"
    return (
        f"{path} is damaged: {where} {found}, the manifest says {listed}. Take the checkpoint from another copy, "
        f"or go back to an earlier one with --iteration N"
    )


class _Sum:
    """The checksum of a file, computed chunk by chunk by several threads."""

    def __init__(self, path: Path) -> None:
        self._pool = ThreadPoolExecutor(summing_threads(), "checksum")
        self._path = path
        self._size = path.stat().st_size if path.is_file() else 0
        self._thread = threading.local()
        self._parts = [self._pool.submit(self._part, start) for start in range(0, self._size, _CHUNK)]

    def result(self) -> str:
        """The checksum, as a manifest writes it. CheckpointError if the file cannot be read."""
        crc = 0
        try:
            for part in self._parts:
                found, count = part.result()
                crc = combine(crc, found, count)
        except OSError as error:
            raise CheckpointError(one_line(error)) from error
        finally:
            self._pool.shutdown(cancel_futures=True)
        return format_checksum(crc)

    def _part(self, start: int) -> tuple[int, int]:
        """(CRC-32, bytes) of a chunk. Each thread reuses its own buffer, which stays in cache."""
        if not hasattr(self._thread, "buffer"):
            self._thread.buffer = memoryview(bytearray(_BUFFER))
        buffer: memoryview = self._thread.buffer
        crc, place, end = 0, start, min(start + _CHUNK, self._size)
        with open(self._path, "rb", buffering=0) as file:
            while place < end:
                count = os.preadv(file.fileno(), [buffer[: end - place]], place)
                if not count:
                    break  # the file was truncated: its checksum will differ
                crc = crc32(buffer[:count], crc)
                place += count
        return crc, place - start


def summing_threads() -> int:
    """One thread for each core beside the one that loads; at least one, at most four."""
    return max(1, min(4, len(os.sched_getaffinity(0)) - 1))
