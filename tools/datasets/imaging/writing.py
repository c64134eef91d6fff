"""Decoding and writing in the workers: pixels go from each worker to the `.bin` itself, and not through the parent."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, field

from megatron.common.crc import crc32
from tools.datasets.imaging.decode import BandMoments, ImageBlock, ImageDecoder


class Baton:
    """Where each block begins in the file that all workers write to.

    That is where the blocks before it end, which is known once they are decoded: whoever has decoded block n waits for
    the baton, adds the length of it and hands the baton on before writing. It works as long as every block is decoded,
    and no worker begins one before those before it are begun.
    """

    def __init__(self, workers: int, block: int, end: int) -> None:
        """`block` is the first that will come, at byte `end`."""
        context = multiprocessing.get_context("fork")
        # The blocks in hand follow one another, at most one a worker: with a semaphore each, one is woken at a time.
        self._turns = [context.Semaphore(0) for _ in range(workers)]
        self._end = context.RawValue("q", end)
        self._turns[block % workers].release()

    def take(self, block: int, nbytes: int) -> int:
        """The offset of `block`, which has so many bytes."""
        self._turns[block % len(self._turns)].acquire()
        offset = self._end.value
        self._end.value += nbytes
        self._turns[(block + 1) % len(self._turns)].release()
        return offset


@dataclass
class WrittenBlock:
    """What is known of a block's images that can be used; `rows` are theirs, `bad` is (rule, message) of the others."""

    nbytes: int = 0
    crc32: int = 0
    rows: list[tuple[int, int]] = field(default_factory=list)
    moments: BandMoments = field(default_factory=lambda: BandMoments([], [], []))
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class BlockWriter:
    """The work of a worker: decode a block, write its pixels to the open file `fd`."""

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
            self.baton.take(number, 0)  # or the workers that come next would wait for ever
            raise
        offset = self.baton.take(number, result.nbytes)
        for pixels in images:
            offset = _write(self.fd, pixels, offset)
        return result


def _write(fd: int, values: memoryview, offset: int) -> int:
    """All of it; the offset behind it."""
    while values:
        count = os.pwrite(fd, values, offset)
        values, offset = values[count:], offset + count
    return offset
