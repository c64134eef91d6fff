"""Statistics of a whole tensor that a method needs before it can merge the first band.

TIES needs the magnitude above which the requested share of a delta lies, `rescale: l1` the sums of magnitudes before
and after the mask, slerp the angle between two tensors. A tensor is read by one thread in pieces of a fixed size, and
the sums of pieces are added exactly, so the result depends on the parents only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..convert_hf.stream.band_io import FilePool
from ..convert_hf.stream.tensor_map import rows_and_columns
from .arithmetic import TensorPlan, Term, Trim, slerp_coefficients
from .masks import RESOLUTION, keep_mask
from .parents import Parent

_ELEMENTS = 1 << 16  # per piece; part of the definition of the sums below
_LOW = 1 << 16
_SMALLEST_SUM = 1e-7  # below it, l1 does not rescale (mergekit's constant)


@dataclass(frozen=True)
class Wanted:
    """Statistics to measure for one tensor: TIES's densities (1: keep all), whether l1 rescales, and slerp's t."""

    plan: TensorPlan
    densities: tuple[float, ...] = ()
    l1: bool = False
    t: float | None = None

    @property
    def passes(self) -> int:
        """Number of passes over the parents."""
        trims = any(density < 1 for density in self.densities)
        return (
            3 if trims else int(self.t is not None or (self.l1 and any(t.limit < RESOLUTION for t in self.plan.terms)))
        )


def measure(
    wanted: dict[str, Wanted], parents: Sequence[Parent], threads: int, progress: Callable[[int], None]
) -> dict[str, TensorPlan]:
    """Completed plans by tensor name; plans that need no measuring are returned unchanged."""
    pool = FilePool(os.O_RDONLY)

    def one(name: str) -> tuple[str, TensorPlan]:
        reader = _Pieces(name, wanted[name], parents, pool, progress)
        return name, reader.complete()

    try:
        with ThreadPoolExecutor(max(1, threads)) as executor:
            return dict(executor.map(one, wanted))
    finally:
        pool.close()


class _Pieces:
    """One tensor in all parents, read piece by piece."""

    def __init__(
        self,
        name: str,
        wanted: Wanted,
        parents: Sequence[Parent],
        pool: FilePool,
        progress: Callable[[int], None],
    ) -> None:
        self.name, self.wanted, self.plan = name, wanted, wanted.plan
        self.parents, self.pool, self.progress = parents, pool, progress
        self.shape = parents[0].checkpoint.tensors[name].shape

    def complete(self) -> TensorPlan:
        if self.wanted.t is not None:
            return replace(self.plan, slerp=self._slerp(self.wanted.t))
        if any(density < 1 for density in self.wanted.densities):
            trims = self._trims()
            terms = [replace(t, trim=trim) for t, trim in zip(self.plan.terms, trims, strict=True)]
            return replace(self.plan, terms=tuple(terms))
        if self.wanted.passes:
            factors = self._l1()
            terms = [replace(t, factor=factor) for t, factor in zip(self.plan.terms, factors, strict=True)]
            return replace(self.plan, terms=tuple(terms))
        return self.plan

    def _pieces(self) -> Iterator[tuple[int, list[Tensor]]]:
        """(index of the first element, fp32 values of every parent)."""
        rows, cols = rows_and_columns(self.shape)
        step = max(1, _ELEMENTS // cols)
        largest = max(p.band_bytes(self.name, step) for p in self.parents)
        raw = memoryview(bytearray(largest))
        buffers = [torch.empty(step * cols) for _ in self.parents]
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            values = []
            for parent, buffer in zip(self.parents, buffers, strict=True):
                stored = parent.read(self.pool, self.name, start, stop, raw)
                values.append(parent.widen(self.pool, self.name, start, stop, stored, buffer[: stored.numel()]))
            yield start * cols, values
            self.progress(values[0].numel())

    def _magnitudes(self, term: Term, values: list[Tensor]) -> Tensor:
        return (values[term.parent] - values[term.base]).abs_()

    def _slerp(self, t: float) -> tuple[float, float]:
        sums: tuple[list[float], list[float], list[float]] = ([], [], [])
        for _, values in self._pieces():
            a, b = values[self.plan.base].double(), values[self.plan.terms[0].parent].double()
            for total, value in zip(sums, (a * a, b * b, a * b), strict=True):
                total.append(_sum(value))
        return slerp_coefficients(t, *(math.fsum(total) for total in sums))

    def _l1(self) -> list[float]:
        terms = self.plan.terms
        before: list[list[float]] = [[] for _ in terms]
        after: list[list[float]] = [[] for _ in terms]
        for start, values in self._pieces():
            for i, term in enumerate(terms):
                if term.limit == RESOLUTION:
                    continue
                assert term.key is not None
                size = self._magnitudes(term, values).double()
                before[i].append(_sum(size))
                mask = keep_mask(term.key, start, size.numel(), term.limit)
                after[i].append(_sum(size.mul_(torch.from_numpy(mask))))
        result = []
        for all_, kept in zip(map(math.fsum, before), map(math.fsum, after), strict=True):
            result.append(all_ / kept if min(all_, kept) >= _SMALLEST_SUM else 1.0)
        return result

    def _trims(self) -> list[Trim | None]:
        """The exact k-th largest magnitude of every delta, from a histogram of the upper 16 bits of the fp32 patterns,
        then one of the lower 16 bits within the bin found; equal magnitudes are kept in the order of elements."""
        terms, count = self.plan.terms, math.prod(self.shape)
        wanted = {i: max(1, int(d * count)) for i, d in enumerate(self.wanted.densities) if d < 1}
        # First pass: the bin of the upper 16 bits that holds the k-th largest.
        upper = {i: np.zeros(_LOW, np.int64) for i in wanted}
        for _, values in self._pieces():
            for i in wanted:
                upper[i] += np.bincount(_bits(self._magnitudes(terms[i], values)) >> 16, minlength=_LOW)
        bins = {i: _bin_of(upper[i], k) for i, k in wanted.items()}  # (bin, elements above it)
        # Second pass: its lower 16 bits, and how many elements of exactly this magnitude are kept.
        lower = {i: np.zeros(_LOW, np.int64) for i in wanted}
        for _, values in self._pieces():
            for i in wanted:
                bits = _bits(self._magnitudes(terms[i], values))
                lower[i] += np.bincount(bits[bits >> 16 == bins[i][0]] & (_LOW - 1), minlength=_LOW)
        magnitudes, left = {}, {}
        for i, k in wanted.items():
            low, above = _bin_of(lower[i], k - bins[i][1])
            pattern = np.array([bins[i][0] << 16 | low], np.uint32)
            magnitudes[i] = float(pattern.view(np.float32)[0])
            equal = k - bins[i][1] - above
            left[i] = equal if equal < lower[i][low] else 0
        # Third pass, if not all of them are: the last one kept.
        last = self._last_kept(magnitudes, left)
        return [Trim(magnitudes[i], last.get(i)) if i in wanted else None for i in range(len(terms))]

    def _last_kept(self, magnitudes: dict[int, float], left: dict[int, int]) -> dict[int, int]:
        """Index of the last element to keep among those with the threshold's magnitude."""
        found: dict[int, int] = {}
        if not any(left.values()):
            self.progress(math.prod(self.shape))
            return found
        seen = dict.fromkeys(left, 0)
        for start, values in self._pieces():
            for i, k in left.items():
                if not k or i in found:
                    continue
                at = np.flatnonzero(self._magnitudes(self.plan.terms[i], values).numpy() == magnitudes[i])
                if seen[i] + len(at) >= k:
                    found[i] = start + int(at[k - seen[i] - 1])
                seen[i] += len(at)
        return found


def _sum(values: Tensor) -> float:
    """Sum with NumPy, whose order of additions is the same on all processors; torch's depends on the vector width."""
    return float(np.add.reduce(values.numpy(), axis=None))


def _bits(magnitudes: Tensor) -> np.ndarray:
    """Bit patterns, which sort in the same order as the magnitudes."""
    return magnitudes.numpy().view(np.uint32)


def _bin_of(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """(bin of the k-th largest, number of elements in the bins above it)."""
    from_above = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_above, k))
    return len(histogram) - 1 - at, int(from_above[at] - histogram[::-1][at])
