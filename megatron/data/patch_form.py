"""How an image becomes a sample: its patches in order, and for each the next patch as its target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.data.sample import Sample


def spiral(rows: int, columns: int) -> NDArray[np.int64]:
    """Raster numbers of a grid's cells from its center outwards, clockwise; the first step is to the right.

    On an even side the first of the two middle cells is the center. On a grid that is not square the spiral continues
    outside, and only the cells inside count.
    """
    row, column = (rows - 1) // 2, (columns - 1) // 2
    order = [row * columns + column]
    step, heading = 1, 0
    while len(order) < rows * columns:
        down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[heading % 4]
        for _ in range(step):
            row, column = row + down, column + right
            if 0 <= row < rows and 0 <= column < columns:
                order.append(row * columns + column)
        heading += 1
        step += heading % 2 == 0  # two arms of each length
    return np.array(order, np.int64)


@lru_cache(maxsize=16)
def patch_order(order: str, rows: int, columns: int) -> NDArray[np.int64]:
    """Raster number of the patch at each place of the sequence; `order` is spiral or raster."""
    return spiral(rows, columns) if order == "spiral" else np.arange(rows * columns)


def cut_patches(image: NDArray[Any], size: int, order: str) -> NDArray[Any]:
    """[height, width, bands] -> [patches, size * size * bands], values of a patch by row, column and band."""
    height, width, bands = image.shape
    rows, columns = height // size, width // size
    grid = image.reshape(rows, size, columns, size, bands).swapaxes(1, 2)
    return grid.reshape(rows * columns, size * size * bands)[patch_order(order, rows, columns)]


def join_patches(patches: NDArray[Any], height: int, width: int, size: int, order: str) -> NDArray[Any]:
    """The image [height, width, bands] of all its patches: the inverse of `cut_patches`."""
    rows, columns = height // size, width // size
    raster = np.empty_like(patches)
    raster[patch_order(order, rows, columns)] = patches
    grid = raster.reshape(rows, columns, size, size, -1).swapaxes(1, 2)
    return grid.reshape(height, width, -1)


def blank(patches: NDArray[Any]) -> NDArray[np.bool_]:
    """bool [patches]: patches without content, in which all values are equal or some are NaN."""
    # With a NaN in a patch both are NaN, and NaN compares false.
    return ~(patches.max(axis=-1) > patches.min(axis=-1))


@dataclass(frozen=True)
class PatchForm:
    """How images become samples, the same for all sources of a run.

    `seq_length` is the number of patches read: all but the last, or all, of which the last predicts nothing. `fill` has
    the values of a blank patch, which normalize to 0.
    """

    size: int
    order: str
    seq_length: int
    fill: tuple[float, ...]
    dtype: str

    def make(self, image: NDArray[Any], sample_id: int) -> Sample:
        """Make a sample of [height, width, bands]: patches and targets [s, values], mask [s], True where learned.

        A blank patch is not learned; if it is float32, it is read as `fill`.
        """
        cut = cut_patches(image, self.size, self.order)
        empty = blank(cut)
        if cut.dtype == np.float32 and empty.any():
            cut[empty] = np.resize(np.array(self.fill, np.float32), cut.shape[1])
        targets = np.zeros((self.seq_length, cut.shape[1]), cut.dtype)
        mask = np.zeros(self.seq_length, bool)
        targets[: len(cut) - 1], mask[: len(cut) - 1] = cut[1:], ~empty[1:]
        return Sample(
            patches=torch.from_numpy(cut[: self.seq_length]),
            targets=torch.from_numpy(targets),
            mask=torch.from_numpy(mask),
            sample_id=sample_id,
        )

    def padding(self) -> Sample:
        """A sample that teaches nothing."""
        values = self.size * self.size * len(self.fill)
        nothing = torch.from_numpy(np.zeros((self.seq_length, values), self.dtype))
        mask = torch.zeros(self.seq_length, dtype=torch.bool)
        return Sample(patches=nothing, targets=nothing, mask=mask, sample_id=-1)
