"""The location of one tensor's bytes in a file of any format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .dtypes import DType

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A contiguous row-major tensor in a file: its bytes are `offset : offset + nbytes` of `path`."""

    path: Path
    name: str
    offset: int
    dtype: DType
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize
