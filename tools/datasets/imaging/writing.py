"""Decoding and writing in the workers: each worker writes pixels to the `.bin` itself, not through the parent."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, field

from megatron.common.crc import crc32
from tools.datasets.imaging.decode import BandMoments, ImageBlock, ImageDecoder


class Baton:
    """Gives each block its offset in the file that all workers write to.

    A block begins where the blocks before it end, which is known once they are decoded: the worker that has decoded
    block n waits for the baton, adds its length and passes the baton on before writing. This requires that every block
    is decoded, and that no worker starts a block before the preceding ones have been started.
    """

    def __init__(self, workers: int, block: int, end: int) -> None:
        """`block` is the first to come, at byte `end`."""
        context = multiprocessing.get_context("fork")
        # The blocks in flight are consecutive, at most one per worker: with one semaphore each, only one is woken at a
        # time.
        self._turns = [context.Semaphore(0) for _ in range(workers)]
        self._end = context.RawValue("q", end)
        self._turns[block % workers].release()

    def take(self, block: int, nbytes: int) -> int:
        """The offset of `block`, which has `nbytes` bytes."""
        self._turns[block % len(self._turns)].acquire()
        offset = self._end.value
        self._end.value += nbytes
        self._turns[(block + 1) % len(self._turns)].release()
        return offset


@dataclass
class WrittenBlock:
    """Statistics of a block's usable images and their `rows`; `bad` is (rule, message) of the others."""

    nbytes: int = 0
    crc32: int = 0
    rows: list[tuple[int, int]] = field(default_factory=list)
    moments: BandMoments = field(default_factory=lambda: BandMoments([], [], []))
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class BlockWriter:
    """A worker's task: decode a block, write its pixels to the open file `fd`."""

    decoder: ImageDecoder
    baton: Baton
    fd: int

    def __call__(self, numbered: tuple[int, ImageBlock]) -> WrittenBlock:
        number, block = numbered
        result, images = WrittenBlock(), []
        try:
            for place, image in self.decoder.usable(block, result.bad):
                pixels = image.reshape(-1).view("u1").data
                result.nbytes += len(pixels)
                result.crc32 = crc32(pixels, result.crc32)
                result.moments = result.moments.joined(BandMoments.of(image))
                result.rows.append((block.source, block.first + place))
                images.append(pixels)
        except BaseException:
            self.baton.take(number, 0)  # otherwise the next workers would wait forever
            raise
        offset = self.baton.take(number, result.nbytes)
        for pixels in images:
            offset = _write(self.fd, pixels, offset)
        return result


def _write(fd: int, values: memoryview, offset: int) -> int:
    """Write all of `values`; returns the offset after them."""
    while values:
        count = os.pwrite(fd, values, offset)
        values, offset = values[count:], offset + count
    return offset
