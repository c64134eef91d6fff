"""Reads any range of a checkpoint's optimizer state, from whatever files hold it, and verifies it on the way.

A rank of any layout asks for its own ranges; the index says which files overlap them, and only those are opened. Whole
blocks are read, whose checksums the manifest has. Blocks are cached until the least recently used are evicted, because
neighboring ranges often share one. numpy and the standard library only: a login node can use it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from megatron.checkpoint.optimizer_files import OptimizerIndex, PlacedRange
from megatron.checkpoint.state_ranges import ITEM, block_bytes
from megatron.common.crc import crc32
from megatron.common.errors import CheckpointError
from megatron.layout import TensorRange, TensorSplit, Transfer, row_of, transfers

Elements = NDArray[np.float32]

CACHED_BLOCKS = 48  # 192 MiB
OPEN_FILES = 256


class StateReader:
    """Reads the state that `index` describes from `folder`, for a model sharded as `here` says. Thread-safe.

    `bytes_read` counts what came from the disk.
    """

    def __init__(self, folder: Path, index: OptimizerIndex, here: TensorSplit, blocks: int = CACHED_BLOCKS) -> None:
        self.folder, self.index, self.here = folder, index, here
        self.bytes_read = 0
        self._limit = blocks
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[str, int], _Block] = OrderedDict()  # by file and offset, in order of use
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()
        self._blocks.clear()

    def read(self, where: TensorRange, kind: str, out: Elements) -> None:
        """Fill `out` with array `kind` of a range. Vocabulary padding that the files do not have becomes zero.

        CheckpointError names the file and the elements that are damaged.
        """
        row = row_of(where.layer, where.tensor, self.here.shape)
        parts = list(transfers(row, self.here, where.tp_rank, where.start, where.stop, self.index.split))
        if sum(part.length * part.count for part in parts) < len(out):
            out.fill(0)
        for transfer in parts:
            last = transfer.source + (transfer.count - 1) * transfer.source_pitch + transfer.length
            for placed in self.index.overlapping(where.layer, where.tensor, transfer.tp_rank, transfer.source, last):
                for number in placed.state.blocks():
                    first, end = placed.state.block(number)
                    if runs := _runs_inside(transfer, first, end):
                        with self._block(placed, kind, number) as block:
                            _copy(transfer, runs, block, first, out)

    @contextmanager
    def _block(self, placed: PlacedRange, kind: str, number: int) -> Iterator[Elements]:
        """A verified block, from the cache if it is there; threads that want the same block wait for one read."""
        offset = placed.state.arrays[kind].offset + number * block_bytes()
        first, end = placed.state.block(number)
        with self._lock:
            block = self._blocks.get((placed.file, offset))
            wanted = block is None
            if block is None:
                block = self._blocks[placed.file, offset] = _Block(self._buffer())
            self._blocks.move_to_end((placed.file, offset))
            block.users += 1
        try:
            if wanted:
                try:
                    self._read_block(placed, kind, number, offset, block.buffer[: end - first])
                except BaseException as error:
                    block.ready.set_exception(error)
                else:
                    block.ready.set_result(None)
            block.ready.result()
            yield block.buffer[: end - first]
        finally:
            with self._lock:
                block.users -= 1

    def _buffer(self) -> Elements:
        """Memory for a block: the least recently used idle one's, once the cache is full. The caller holds the lock."""
        if len(self._blocks) >= self._limit:
            for key, block in self._blocks.items():
                if not block.users:
                    del self._blocks[key]
                    return block.buffer
        return np.empty(block_bytes() // ITEM, dtype="<f4")

    def _read_block(self, placed: PlacedRange, kind: str, number: int, offset: int, data: Elements) -> None:
        first, end = placed.state.block(number)
        path = self.folder / placed.file
        file = self._open(placed.file)
        try:
            view, done = data.data.cast("B"), 0
            # The kernel's own read-ahead is too short for a whole block.
            os.posix_fadvise(file.descriptor, offset, len(view), os.POSIX_FADV_WILLNEED)
            while done < len(view):
                count = os.preadv(file.descriptor, [view[done:]], offset + done)
                if not count:
                    raise CheckpointError(f"{path} ended at byte {offset + done} while it was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        finally:
            self._release(file)
        stored = placed.state.arrays[kind]
        if stored.checksums and (found := crc32(view)) != stored.checksums[number]:
            raise CheckpointError(
                f"{path} is damaged: {kind} of layer {placed.state.where.layer} {placed.state.where.tensor}, elements "
                f"[{first}, {end}) of tensor rank {placed.state.where.tp_rank}, has checksum crc32:{found:08x}, the "
                f"manifest says crc32:{stored.checksums[number]:08x}"
            )
        if stored.factor != 1:
            data *= np.float32(stored.factor)
        with self._lock:
            self.bytes_read += len(view)

    def _open(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                try:
                    file = self._files[name] = _OpenFile(os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC))
                except OSError as error:
                    raise CheckpointError(f"{self.folder / name} cannot be opened: {error.strerror}") from error
            self._files.move_to_end(name)
            file.users += 1
            idle = [other for other, known in self._files.items() if not known.users]
            for other in idle[: max(0, len(self._files) - OPEN_FILES)]:
                os.close(self._files.pop(other).descriptor)
            return file

    def _release(self, file: _OpenFile) -> None:
        with self._lock:
            file.users -= 1


class _Block:
    """`ready` is set when the buffer holds the block, or fails with the error of reading it."""

    def __init__(self, buffer: Elements) -> None:
        self.buffer, self.users = buffer, 0
        self.ready: Future[None] = Future()


class _OpenFile:
    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.users = descriptor, 0


def _runs_inside(transfer: Transfer, first: int, end: int) -> range:
    """Numbers of the runs that overlap the source's elements `first:end`."""
    if transfer.count == 1:
        touches = transfer.source < end and first < transfer.source + transfer.length
        return range(1 if touches else 0)
    low = max(0, (first - transfer.source - transfer.length) // transfer.source_pitch + 1)
    high = min(transfer.count, (end - transfer.source - 1) // transfer.source_pitch + 1)
    return range(low, max(low, high))


def _copy(transfer: Transfer, runs: range, block: Elements, first: int, out: Elements) -> None:
    """Copy the part of some runs that lies in `block`, whose first element is the source's element `first`."""
    end = first + len(block)
    whole = runs
    for run in dict.fromkeys((runs[0], runs[-1])):  # only these can be cut by the block's ends
        source = transfer.source + run * transfer.source_pitch
        low, high = max(source, first), min(source + transfer.length, end)
        if high - low == transfer.length:
            continue
        target = transfer.target + run * transfer.target_pitch + low - source
        out[target : target + high - low] = block[low - first : high - first]
        whole = range(max(whole.start, run + 1), whole.stop) if run == runs[0] else range(whole.start, run)
    if not whole:
        return
    shape = (len(whole), transfer.length)
    source = transfer.source + whole[0] * transfer.source_pitch - first
    target = transfer.target + whole[0] * transfer.target_pitch
    pitches = (transfer.source_pitch * ITEM, ITEM), (transfer.target_pitch * ITEM, ITEM)
    as_strided(out[target:], shape, pitches[1])[...] = as_strided(block[source:], shape, pitches[0])
