"""Move bands of rows between files and memory with vectored reads and writes.

A band is a range of rows of a logical tensor, with all columns, row-major in a buffer. The runs of bytes that a region
contributes to a band are sorted by file position and merged, so that contiguous bytes of a file take one system call
regardless of how their rows are arranged in the band (a column shard, a permuted head). Files are not mapped with mmap:
on network file systems page faults are far slower than reads.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConvertError
from .tensor_map import Logical, Region, rows_and_columns

_VECTOR = min(1024, os.sysconf("SC_IOV_MAX"))
MAX_OPEN = 256

Run = tuple[int, int, int]  # position in the file, bytes, position in the band


class FilePool:
    """Open file descriptors by path, shared by threads; beyond `MAX_OPEN`, the longest unused are closed."""

    def __init__(self, flags: int) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # path -> [descriptor, users]

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = [os.open(path, self._flags), 0]
                except OSError as error:
                    raise ConvertError(f"{path} cannot be opened: {error.strerror}") from None
            entry = self._open[path]
            entry[1] += 1  # before others are closed, so that this one is not
            self._open.move_to_end(path)
            self._shrink()
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def _shrink(self) -> None:
        idle = [p for p, (_, users) in self._open.items() if not users]
        for path in idle[: max(0, len(self._open) - MAX_OPEN)]:
            os.close(self._open.pop(path)[0])

    def sync(self, paths: Iterable[Path]) -> None:
        for path in paths:
            with self.use(path) as descriptor:
                os.fdatasync(descriptor)

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._open.values():
                os.close(descriptor)
            self._open.clear()


def region_runs(region: Region, start: int, stop: int, band_cols: int, itemsize: int) -> list[Run]:
    """Runs of `region` that fall into logical rows `start:stop`, for a band of `band_cols` columns."""
    first, last = max(start, region.to_row), min(stop, region.to_row + region.rows)
    if first >= last:
        return []
    stored_cols = rows_and_columns(region.stored.shape)[1]
    row = region.row + (first - region.to_row) * region.step
    position = region.stored.offset + (row * stored_cols + region.col) * itemsize
    place = ((first - start) * band_cols + region.to_col) * itemsize
    if region.cols == stored_cols == band_cols and region.step == 1:
        return [(position, (last - first) * band_cols * itemsize, place)]
    pitch, band_pitch, nbytes = stored_cols * region.step * itemsize, band_cols * itemsize, region.cols * itemsize
    return [(position + i * pitch, nbytes, place + i * band_pitch) for i in range(last - first)]


def _batches(runs: list[Run], band: memoryview) -> Iterator[tuple[int, list[memoryview]]]:
    """(file position, slices of the band in file order), one pair per contiguous part of the file."""
    runs.sort()
    vector: list[memoryview] = []
    position = end = -1
    for at, nbytes, place in runs:
        if at != end or len(vector) == _VECTOR:
            if vector:
                yield position, vector
            position, vector = at, []
        vector.append(band[place : place + nbytes])
        end = at + nbytes
    if vector:
        yield position, vector


def _skip(vector: list[memoryview], done: int) -> list[memoryview]:
    for i, part in enumerate(vector):
        if done < len(part):
            return [part[done:], *vector[i + 1 :]]
        done -= len(part)
    return []


def read_runs(descriptor: int, path: Path, runs: list[Run], band: memoryview) -> None:
    for position, vector in _batches(runs, band):
        while vector:
            done = os.preadv(descriptor, vector, position)
            if not done:
                raise ConvertError(f"{path} ended at byte {position} while it was read; was it changed?")
            position += done
            vector = _skip(vector, done)


def write_runs(descriptor: int, runs: list[Run], band: memoryview) -> None:
    for position, vector in _batches(runs, band):
        while vector:
            done = os.pwritev(descriptor, vector, position)
            position += done
            vector = _skip(vector, done)


def read_band(pool: FilePool, tensor: Logical, start: int, stop: int, band: memoryview) -> None:
    """Fill `band` with rows `start:stop` of a logical tensor."""
    cols = rows_and_columns(tensor.shape)[1]
    by_path: dict[Path, list[Run]] = {}
    for region in tensor.regions:
        runs = region_runs(region, start, stop, cols, tensor.dtype.itemsize)
        if runs:
            by_path.setdefault(region.stored.path, []).extend(runs)
    for path, runs in by_path.items():
        with pool.use(path) as descriptor:
            try:
                read_runs(descriptor, path, runs, band)
            except OSError as error:
                raise ConvertError(f"{path} cannot be read: {error.strerror}") from None


def bands(tensor: Logical, nbytes: int) -> Iterator[tuple[int, int]]:
    """Row ranges of bands of at most `nbytes` bytes (at least one row each)."""
    rows, cols = rows_and_columns(tensor.shape)
    step = max(1, nbytes // max(1, cols * tensor.dtype.itemsize))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
