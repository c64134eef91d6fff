"""`data_order: gpt-neox`: the order in which GPT-NeoX reads samples for the same seed, files, weights and run length.

For continuing a run that GPT-NeoX started: no sample is repeated or left out. Unlike this project's own order it
depends on the length of the run: all epochs are shuffled at once.

GPT-NeoX's method, for one source and N samples of s tokens: take the smallest number of epochs that holds them, and the
documents of all these epochs in one random order; sample k is tokens k s to k s + s of that stream; the samples are
read in a second random order, drawn from the same generator. With several sources, place i goes to the source furthest
behind its weight, and each source is prepared for half a percent more samples than its weight requires.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.data.blend import Mixture, shares
from megatron.data.index_cache import Arrays, CachedIndex
from megatron.data.indexed import open_indexed
from megatron.data.sample import SampleForm
from megatron.data.sources import Piece, TokenSource
from megatron.data.targets import StreamTargets, describe_silent, refuse_silent

MARGIN = 1.005  # factor on the samples of each of several sources


class GptNeoxPack(TokenSource):
    """`packed` documents in GPT-NeoX's order, prepared for `samples` samples."""

    def __init__(
        self,
        prefix: str,
        form: SampleForm,
        seed: int,
        samples: int,
        documents: tuple[int, int] | None = None,
        labels: str | None = None,
    ) -> None:
        super().__init__(prefix, form, documents, labels)
        self._seed = seed
        self.samples_per_epoch = self.tokens / form.seq_length
        # The last sample of the last epoch needs one token more than it learns.
        self.epochs = max(1, -(-(samples * form.seq_length + 1) // self.tokens))
        self._length = (self.epochs * self.tokens - 1) // form.seq_length
        identity = self.index_identity(seed, order="gpt-neox", epochs=self.epochs)
        self._index = CachedIndex(prefix, f"{form.seq_length}s_{self.epochs}ep_neox", identity, self.build_index)

    def __len__(self) -> int:
        return self._length

    def build_index(self) -> Arrays:
        """`order`: documents of all epochs in reading order; `ends`: where each ends in the stream, in tokens;
        `samples`: for the i-th sample read, which sample of the stream it is. With labels, `silent`: how many samples
        have no target, and how many there are."""
        start, stop = self.documents
        random = np.random.RandomState(self._seed)
        order = np.tile(np.arange(start, stop, dtype=np.int32), self.epochs)
        random.shuffle(order)
        ends = np.cumsum(np.array(open_indexed(self.prefix).sizes)[order], dtype=np.int64)
        samples = np.arange(self._length, dtype=np.uint32 if self._length < 2**32 - 2 else np.int64)
        random.shuffle(samples)
        arrays: Arrays = {"order": order, "ends": ends, "samples": samples}
        if self.labels is not None:
            refuse_silent(self.prefix, self.labels, self.documents, self.form)
            targets = StreamTargets(self.labels, self.form)
            targets.add(order)
            taught = len(targets.with_targets(0, self._length))
            arrays["silent"] = np.array([self._length - taught, self._length])
        return arrays

    def describe_left_out(self) -> list[str]:
        """A line on samples without a target; GPT-NeoX's order includes them, so none is left out."""
        if self.labels is None:
            return []
        why = "nothing to learn; data_order: gpt-neox leaves nothing out"
        return describe_silent(self.prefix, self._index.arrays()["silent"], "are read in vain", why)

    def pieces(self, index: int) -> list[Piece]:
        arrays = self._index.arrays()
        return list(self._stream(arrays, int(arrays["samples"][index]) * self.form.seq_length))

    def _stream(self, arrays: Arrays, offset: int) -> Iterator[Piece]:
        """Pieces of the s + 1 tokens of the stream from `offset` on."""
        order, ends = arrays["order"], arrays["ends"]
        wanted = self.form.seq_length + 1
        place = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[place - 1]) if place else 0
        while wanted:
            length = min(int(ends[place]) - offset, wanted)
            if length:
                yield int(order[place]), offset - start, length
            wanted -= length
            offset = start = int(ends[place])
            place += 1


def samples_of_sources(weights: Sequence[float], samples: int) -> list[int]:
    """How many samples each of several sources is prepared for."""
    return [math.ceil(samples * share * MARGIN) for share in normalized(weights)]


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, added in order: another order would change the last bit."""
    total = sum(weights)
    return [weight / total for weight in weights]


def gpt_neox_mixture(sizes: Sequence[int], weights: Sequence[float] | None, samples: int, global_micro: int) -> Mixture:
    """GPT-NeoX's order of `samples` places over sources that have `sizes` samples; without weights there is one source.

    Its loader reads whole global micro-batches (`global_micro` samples) and starts over at the end of the data; the
    last sample of every source is left out.
    """
    readable = [max(1, size - 1) for size in sizes]
    usable = max(global_micro, sum(readable) // global_micro * global_micro)
    count = min(samples, usable)
    if weights is None or len(sizes) == 1:
        source_of, within = np.zeros(count, np.int32), np.arange(count, dtype=np.int64)
    else:
        source_of, within = _furthest_behind(shares(normalized(weights)), count)
    places = np.arange(samples) % usable
    # GPT-NeoX takes a sample beyond a source's end modulo its length.
    lengths = np.array(readable)[source_of]
    within = np.where(within < np.array(sizes)[source_of], within, within % lengths)
    return Mixture(source_of[places], within[places], None)


def _furthest_behind(share: NDArray[np.float64], count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """For each place, the source whose samples so far are furthest below its share; ties go to the first."""
    source_of, within = np.empty(count, np.int32), np.empty(count, np.int64)
    given = np.zeros(len(share))
    for place in range(count):
        source = int(np.argmax(share * max(place, 1) - given))
        source_of[place], within[place] = source, given[source]
        given[source] += 1
    return source_of, within


def weights_by_documents(documents: Sequence[int], alpha: float) -> list[float]:
    """GPT-NeoX's `weight_by_num_documents`: a source with share p of all documents weighs p^alpha (1 - p)."""
    if len(documents) == 1:
        return [1.0]
    share = normalized(documents)
    sampled = normalized([part**alpha for part in share])
    return normalized([chosen * (1 - part) for chosen, part in zip(sampled, share, strict=True)])
