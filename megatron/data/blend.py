"""Several sources as one: which source each sample of the run comes from.

The j-th sample of a source with share w is due at time (j + phase) / w, and samples are read in the order in which
they are due; the phases of the sources are spread evenly over 0 to 1, or a thousand small sources would all be due
first at the same late moment. So every stretch of the run holds each source in its share to within a few samples, a
longer run begins like a shorter one, and nothing is drawn at random here: the sources' own streams are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import DataError
from megatron.data.sample import Sample, SampleDataset
from megatron.data.sources import Source


def shares(weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights divided by their sum. Raises DataError unless all are finite and none is negative."""
    array = np.asarray(weights, np.float64)
    if not np.isfinite(array).all() or (array < 0).any() or array.sum() <= 0:
        raise DataError(f"data weights {list(weights)}: expected numbers of at least 0 with a positive sum")
    return array / array.sum()


def assign_sources(share: NDArray[np.float64], samples: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """For each of `samples` places: the source, and how many samples of that source came before.

    `share` [sources] sums to 1. Time and memory grow as the number of samples, not times the number of sources.
    """
    counts = np.ceil(share * (samples + len(share))).astype(np.int64) + 1  # none is further ahead of its share
    counts[share == 0] = 0
    source = np.repeat(np.arange(len(share), dtype=np.int32), counts)
    within = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    due = (within + _phases(len(share))[source]) / share[source]
    first = np.argsort(due, kind="stable")[:samples]
    return source[first], within[first]


def _phases(count: int) -> NDArray[np.float64]:
    """The van der Corput sequence 1/2, 1/4, 3/4, 1/8, ...: every beginning of it is spread evenly."""
    bits = np.arange(1, count + 1)
    phase = np.zeros(count)
    scale = 0.5
    while bits.any():
        phase += (bits & 1) * scale
        bits, scale = bits >> 1, scale / 2
    return phase


class Blend(SampleDataset):
    """A dataset of `len(source_of)` samples; place i is sample `within[i]` of `sources[source_of[i]]`."""

    def __init__(self, sources: Sequence[Source], source_of: NDArray[np.int32], within: NDArray[np.int64]) -> None:
        self.sources, self.source_of, self.within = list(sources), source_of, within

    def __len__(self) -> int:
        return len(self.source_of)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sources[self.source_of[index]].read(int(self.within[index]), index)

    def padding(self) -> Sample:
        return self.sources[0].padding()

    def describe(self) -> list[str]:
        """One line per source for the log: its realised share of the run and how often it is read."""
        used = np.bincount(self.source_of, minlength=len(self.sources))
        return [
            f"{source.prefix}: {count} samples, {count / max(len(self), 1):.2%} of the run, "
            f"{count / source.samples_per_epoch:.3g} epochs"
            for source, count in zip(self.sources, used.tolist(), strict=True)
        ]
