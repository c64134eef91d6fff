"""The building blocks of a plan: tensors stored in files, and the rectangles that map them to logical (HF) tensors.

A logical tensor is named and shaped as in a Hugging Face Llama. A checkpoint of any format is a list of regions:
rectangles of a stored tensor, each with its position in a logical tensor. Checkpoints that cover the same logical
tensors can be converted into one another, for any packing and tensor-parallel size. Nothing here is specific to
weights, so optimizer states can use the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron.layout import LlamaShape, TensorRow, rank_slices, source_shapes

from ..formats.dtypes import DType
from ..formats.stored import Shape, Stored


def rows_and_columns(shape: Shape) -> tuple[int, int]:
    """A tensor's shape as a matrix: the first dimension, and the product of all others (1 for a vector)."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Region:
    """`rows` x `cols` elements of a stored tensor and their position in the logical tensor `logical`.

    Stored row `row + i * step`, columns from `col`, is logical row `to_row + i`, columns from `to_col`. `logical` is
    None for zero padding, which has no source.
    """

    stored: Stored
    logical: str | None
    row: int
    col: int
    rows: int
    cols: int
    to_row: int = 0
    to_col: int = 0
    step: int = 1


@dataclass
class Logical:
    """A logical tensor of a checkpoint: its regions cover it once; `replicas` are further full copies of it."""

    name: str
    shape: Shape
    dtype: DType
    regions: list[Region] = field(default_factory=list)
    replicas: list[Stored] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def covered(self) -> bool:
        return sum(r.rows * r.cols for r in self.regions) == math.prod(self.shape)


def whole_region(stored: Stored, logical: str) -> Region:
    """The region of a stored tensor that is the whole of `logical`."""
    rows, cols = rows_and_columns(stored.shape)
    return Region(stored, logical, 0, 0, rows, cols)


def chunk_region(stored: Stored, logical: str, dim: int, index: int) -> Region:
    """The region of a stored tensor that is chunk `index` of `logical`, cut into equal chunks along `dim`."""
    rows, cols = rows_and_columns(stored.shape)
    return Region(
        stored,
        logical,
        0,
        0,
        rows,
        cols,
        to_row=index * rows if dim == 0 else 0,
        to_col=index * cols if dim == 1 else 0,
    )


def layout_regions(
    row: TensorRow, layer: int | None, shape: LlamaShape, tp: int, tp_rank: int, stored: Stored
) -> Iterator[Region]:
    """Regions of one rank's tensor in a NeoX layer file, from the layout table (`megatron.layout`)."""
    names = [name.format(layer=layer) for name in row.hf]
    shapes = source_shapes(row, shape)
    position = 0
    for part in rank_slices(row, shape, tp, tp_rank):
        length = len(part)
        if row.shard_dim == 1:
            rows = shapes[part.source or 0][0]
            where = (0, position, rows, length, 0, part.start)
        else:
            cols = rows_and_columns(stored.shape)[1]
            where = (position, 0, length, cols, part.start, 0)
        yield Region(stored, None if part.source is None else names[part.source], *where)
        position += length
