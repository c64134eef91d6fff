"""Blends several sources: which source each sample of the run comes from, and what of it is replayed.

The j-th sample of a source with share w is due at time (j + phase) / w, and samples are read in the order in which they
are due. The phases of the sources are spread evenly over 0 to 1; otherwise a thousand small sources would all be due
first at the same late moment. So every stretch of the run holds each source in its share to within a few samples, a
longer run begins like a shorter one, and no choice of a source is random, only the order within each source.

A source with `replay` is general text that accompanies the other sources, the corpus. It supplies its share of every
epoch of the corpus; with `fresh_each_epoch` it continues from epoch to epoch, and repeats nothing before all of it has
been read. AstroSage-70B's continued pre-training found this crucial.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron.data.sample import Sample, SampleDataset, SampleSource

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.data import Replay

MAX_EPOCHS_SHOWN = 8


def shares(weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights divided by their sum."""
    array = np.asarray(weights, np.float64)
    return array / array.sum()


def assign_sources(share: NDArray[np.float64], samples: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """For each of `samples` places: the source, and how many samples of that source came before.

    `share` [sources] sums to 1. Time and memory grow with the number of samples, not with samples x sources.
    """
    counts = np.ceil(share * (samples + len(share))).astype(np.int64) + 1  # no source gets further ahead of its share
    counts[share == 0] = 0
    source = np.repeat(np.arange(len(share), dtype=np.int32), counts)
    within = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    due = (within + _phases(len(share))[source]) / share[source]
    first = np.argsort(due, kind="stable")[:samples]
    return source[first], within[first]


def _phases(count: int) -> NDArray[np.float64]:
    """The van der Corput sequence 1/2, 1/4, 3/4, 1/8, ...: every prefix of it is spread evenly."""
    bits = np.arange(1, count + 1)
    phase = np.zeros(count)
    scale = 0.5
    while bits.any():
        phase += (bits & 1) * scale
        bits, scale = bits >> 1, scale / 2
    return phase


@dataclass(frozen=True)
class Mixture:
    """The order of a run: place i is sample `within[i]` of source `source_of[i]`. `epoch` is the number of places in
    which the corpus is read once, None without replay."""

    source_of: NDArray[np.int32]
    within: NDArray[np.int64]
    epoch: float | None

    def needed(self, sources: int) -> list[int]:
        """How many samples each of the sources must provide, at least 1."""
        highest = np.zeros(sources, np.int64)
        np.maximum.at(highest, self.source_of, self.within)
        return (highest + 1).tolist()


def mix(
    epochs: Sequence[float], weights: Sequence[float] | None, replays: Sequence[Replay | None], samples: int
) -> Mixture:
    """The order of `samples` samples of sources that have `epochs` samples each.

    `weights` are those of the corpus's sources, in order; the keys' rules ensure that replay leaves the corpus a share.
    Without weights all sources weigh the same (GPT-NeoX's rule), except with replay: an epoch of the corpus must then
    read each of its documents once, so sources weigh by their size.
    """
    corpus = [i for i, replay in enumerate(replays) if replay is None]
    replayed = sum(replay.share for replay in replays if replay is not None)
    any_replay = len(corpus) < len(replays)
    default = [epochs[i] if any_replay else 1.0 for i in corpus]
    share = np.zeros(len(epochs))
    share[corpus] = (1 - replayed) * shares(default if weights is None else weights)
    for i, replay in enumerate(replays):
        if replay is not None:
            share[i] = replay.share
    source_of, within = assign_sources(share, samples)
    if not any_replay:
        return Mixture(source_of, within, None)
    epoch = sum(epochs[i] for i in corpus) / (1 - replayed)
    for i, replay in enumerate(replays):
        if replay is not None and not replay.fresh_each_epoch:
            within[source_of == i] %= max(1, round(replay.share * epoch))
    return Mixture(source_of, within, epoch)


class Blend(SampleDataset):
    """Sources in the order of a mixture."""

    def __init__(self, sources: Sequence[SampleSource], mixture: Mixture) -> None:
        self.sources, self.mixture = list(sources), mixture

    def __len__(self) -> int:
        return len(self.mixture.source_of)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = self.sources[self.mixture.source_of[index]]
        return source.read(int(self.mixture.within[index]), index)

    def padding(self) -> Sample:
        return self.sources[0].padding()

    def shares(self, first: int, end: int) -> list[tuple[str, int, float]]:
        """(prefix, samples, passes over it) of each source in the places [first, end) of the order."""
        counts = np.bincount(self.mixture.source_of[first:end], minlength=len(self.sources))
        return [
            (source.prefix, int(count), float(count / source.samples_per_epoch))
            for source, count in zip(self.sources, counts, strict=True)
        ]

    def describe(self) -> list[str]:
        """Lines for the log: each source's realized share of the run and of each epoch, and how often it is read."""
        return [self._line(i) for i in range(len(self.sources))]

    def _line(self, source: int) -> str:
        chosen = self.mixture.source_of == source
        count, part = int(chosen.sum()), self.sources[source]
        line = (
            f"{part.prefix}: {count} samples, {count / max(len(self), 1):.2%} of the run, "
            f"{count / part.samples_per_epoch:.3g} epochs"
        )
        if self.mixture.epoch is None:
            return line
        edges = np.arange(0, len(self) + self.mixture.epoch, self.mixture.epoch).astype(int).clip(max=len(self))
        parts = [f"{chosen[a:b].mean():.2%}" for a, b in itertools.pairwise(edges) if b > a]
        more = f" and {len(parts) - MAX_EPOCHS_SHOWN} more" if len(parts) > MAX_EPOCHS_SHOWN else ""
        return f"{line}; by epoch of the corpus {', '.join(parts[:MAX_EPOCHS_SHOWN])}{more}"
