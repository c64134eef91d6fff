"""Checksums verified while loading: on the bytes that the load reads anyway, by a thread beside it.

A file is summed from front to back while the load reads it. Whoever comes first brings a page into the system's cache,
so the file is read from the disk once; zlib and reads release the interpreter's lock, so where a core is free the sum
hides behind the read. `benchmarks/loading.py` measures it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.manifest import FileEntry, format_checksum
from megatron.checkpoint.torch_files import tensor_checksum
from megatron.common.errors import CheckpointError, one_line

_CHUNK = 1 << 22  # bytes; small enough to stay in a core's cache between the read and the sum


@contextlib.contextmanager
def verified(path: Path, entry: FileEntry | None) -> Iterator[None]:
    """Whatever the body reads of `path` is as the manifest's `entry` says when this ends; CheckpointError if not.

    The body must not act on what it has read: it is known to be right only afterwards. An error of the body is raised
    in place of the verdict, unless the file is damaged, which explains it. Without an entry or a checksum of the whole
    file nothing is compared.
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
    """The same for a layer file whose tensors, mapped from it, are `stored`; its entry may list tensors alone."""
    if entry is None or entry.checksum is not None:
        with verified(path, entry):
            yield
        return
    with ThreadPoolExecutor(1, "checksum") as pool:
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
    """A thread that sums a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._crc = path, 0
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="checksum", daemon=True)
        self._thread.start()

    def result(self) -> str:
        """The checksum, as a manifest writes it. CheckpointError if the file cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise CheckpointError(one_line(self._error)) from self._error
        return format_checksum(self._crc)

    def _run(self) -> None:
        try:
            self._crc = file_crc(self._path)
        except OSError as error:
            self._error = error


def file_crc(path: Path) -> int:
    """CRC-32 of a file, in one buffer."""
    buffer = bytearray(_CHUNK)
    view, crc = memoryview(buffer), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while count := os.readv(descriptor, [buffer]):
            crc = zlib.crc32(view[:count], crc)
    finally:
        os.close(descriptor)
    return crc
