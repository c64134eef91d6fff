"""Ranges of elements of a tensor-parallel rank's tensors, and their location when the model is split differently.

Optimizer state is stored by ranges, so that any part of it can be addressed at any tensor-, pipeline- and data-parallel
size. Elements are counted in the rank's own tensor, flattened row by row. Ranges of one tensor-parallel size map to
those of another through the Hugging Face tensors that both are slices of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron.layout.packing import rank_shape, rank_slices
from megatron.layout.row import TensorRow
from megatron.layout.shape import LlamaShape


@dataclass(frozen=True, order=True)
class TensorRange:
    """Elements `start:stop` of the tensor `tensor` in layer file `layer` that rank `tp_rank` holds."""

    layer: int
    tensor: str
    tp_rank: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"layer {self.layer} {self.tensor} of tensor rank {self.tp_rank}, elements [{self.start}, {self.stop})"


@dataclass(frozen=True)
class TensorSplit:
    """A model and the tensor-parallel size that it is sharded for; the vocabulary of `shape` is padded for it."""

    shape: LlamaShape
    tp: int

    def numel(self, row: TensorRow) -> int:
        """Elements of a row's tensor on one rank."""
        return prod(rank_shape(row, self.shape, self.tp))


@dataclass(frozen=True)
class Transfer:
    """`count` runs of `length` elements from rank `tp_rank`'s tensor into a range.

    Run k begins at element `source + k * source_pitch` of that rank's tensor and goes to element
    `target + k * target_pitch` of the range.
    """

    tp_rank: int
    source: int
    target: int
    length: int
    count: int = 1
    source_pitch: int = 0
    target_pitch: int = 0


def transfers(
    row: TensorRow, here: TensorSplit, tp_rank: int, start: int, stop: int, there: TensorSplit
) -> Iterator[Transfer]:
    """Location under the split `there` of the elements `start:stop` of rank `tp_rank`'s tensor under the split `here`.

    Elements that no transfer covers are vocabulary padding that `there` does not have: zeros.
    """
    if here.tp == there.tp and here.numel(row) == there.numel(row):
        yield Transfer(tp_rank, start, 0, stop - start)
        return
    if row.replicated:  # copies are bit-equal: any rank's will do
        yield Transfer(0, start, 0, stop - start)
        return
    width, their_width = _width(row, here), _width(row, there)
    for first_row, rows, first, last in _rectangles(start, stop, width):
        for source, logical, position, length in _slices(row, here)[tp_rank]:
            low, high = max(first, position), min(last, position + length)
            if low >= high or source is None:
                continue
            wanted = logical + low - position  # the part low:high in its Hugging Face tensor
            for rank, theirs in enumerate(_slices(row, there)):
                for other, their_logical, their_position, their_length in theirs:
                    begin = max(wanted, their_logical)
                    end = min(wanted + high - low, their_logical + their_length)
                    if other != source or begin >= end:
                        continue
                    yield Transfer(
                        rank,
                        first_row * their_width + their_position + begin - their_logical,
                        first_row * width + low + begin - wanted - start,
                        end - begin,
                        rows,
                        their_width,
                        width,
                    )


_Slice = tuple[int | None, int, int, int]  # source, first element in it, position in the rank's rows, elements


def _width(row: TensorRow, split: TensorSplit) -> int:
    """Elements per row of a rank's tensor. Sharded along dimension 0 it is one row, as slices are contiguous."""
    shape = rank_shape(row, split.shape, split.tp)
    return prod(shape) if row.shard_dim == 0 else prod(shape[1:])


@lru_cache(maxsize=256)
def _slices(row: TensorRow, split: TensorSplit) -> tuple[tuple[_Slice, ...], ...]:
    """What each rank's rows (of `_width` elements) consist of."""
    unit = prod(rank_shape(row, split.shape, split.tp)[1:]) if row.shard_dim == 0 else 1
    ranks = []
    for tp_rank in range(split.tp):
        slices: list[_Slice] = []
        position = 0
        for part in rank_slices(row, split.shape, split.tp, tp_rank):
            slices.append((part.source, part.start * unit, position, len(part) * unit))
            position += len(part) * unit
        ranks.append(tuple(slices))
    return tuple(ranks)


def _rectangles(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first column, last column) of at most three rectangles that make up `start:stop`."""
    row, column = divmod(start, width)
    if column:
        end = min(stop, (row + 1) * width)
        yield row, 1, column, column + end - start
        start, row = end, row + 1
    rows = (stop - start) // width
    if rows > 0:
        yield row, rows, 0, width
        start, row = start + rows * width, row + rows
    if start < stop:
        yield row, 1, 0, stop - start
