"""Samples of one source: s + 1 consecutive tokens of its stream, as inputs and the tokens they must predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron.data.epochs import count_tokens, load_index, plan_epochs, prepare_index
from megatron.data.indexed import DataError, IndexedFile, open_indexed

IGNORED = -100
_PASS = 2  # a use of the seed beside those in epochs.py


class Sample(TypedDict, total=False):
    """int64 tensors of length s. `labels[i]` is what position i must predict, -100 where nothing is learned.
    `positions` restart at 0 with every document and are there only if documents are isolated. `sample_id` is the
    sample's place in the order of the run, -1 for padding that completes a batch."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    sample_id: int


class SampleDataset(Dataset[Sample], ABC):
    """What a trainer reads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def padding(self) -> Sample:
        """A sample that teaches nothing."""


@dataclass(frozen=True)
class SampleForm:
    """How tokens become a sample, the same for all sources of a run."""

    seq_length: int
    isolate_documents: bool = False
    masked_input: int | None = None  # positions whose input is this id predict nothing (`eod_mask_loss`)
    pad: int = 0

    def make(
        self, tokens: NDArray[np.int64], labels: NDArray[np.int64] | None, starts: list[int], sample_id: int
    ) -> Sample:
        """From up to s + 1 tokens, their labels by token (None: the tokens) and where documents begin in them.

        With isolated documents the last position of each has nothing to predict: the next token is another's.
        """
        s, n = self.seq_length, len(tokens)
        inputs = np.full(s, self.pad, np.int64)
        targets = np.full(s, IGNORED, np.int64)
        length = min(n, s)
        inputs[:length] = tokens[:length]
        targets[: n - 1] = tokens[1:] if labels is None else labels[1:]
        targets[targets < 0] = IGNORED
        if self.masked_input is not None:
            targets[inputs == self.masked_input] = IGNORED
        sample = Sample(tokens=torch.from_numpy(inputs), labels=torch.from_numpy(targets), sample_id=sample_id)
        if self.isolate_documents:
            positions = np.arange(s, dtype=np.int64)
            for start in [*(b for b in starts if 0 < b < s), *([n] if n < s else [])]:
                positions[start:] = np.arange(s - start)
            targets[[b - 1 for b in starts if 0 < b <= s]] = IGNORED
            sample["positions"] = torch.from_numpy(positions)
        return sample

    def padding(self) -> Sample:
        return self.make(np.full(1, self.pad, np.int64), None, [0], -1)


class PackedSource(SampleDataset):
    """A part of one `.bin/.idx` as samples.

    With a number of `samples` the stream goes on for that many, epoch after epoch. Without one (validation) it is the
    documents once, in the order of the file, and its last sample is padded: every token is there exactly once. These
    samples are read in a fixed random order, so that the first few of them are a fair choice.
    """

    def __init__(
        self,
        prefix: str,
        form: SampleForm,
        seed: int,
        samples: int | None,
        documents: tuple[int, int] | None = None,
        labels: str | None = None,
    ) -> None:
        """Raises DataError for unusable files; builds the index if it is not on the disk yet."""
        self.prefix, self.labels, self.form = prefix, labels, form
        file = open_indexed(prefix)
        self.documents = documents or (0, len(file))
        if labels is not None:
            _check_labels(file, open_indexed(labels))
        self._order: NDArray[np.integer] | None = None
        if samples is None:
            self.tokens_per_epoch = count_tokens(prefix, self.documents)
            samples = -(-(self.tokens_per_epoch - 1) // form.seq_length)
            self._order = np.random.RandomState([seed, 0, _PASS]).permutation(samples)
        else:
            self.plan = plan_epochs(prefix, self.documents, form.seq_length, seed, samples)
            self.tokens_per_epoch = self.plan.tokens
            self._folder = prepare_index(self.plan)
            load_index(self.plan, self._folder)
        self._length = samples

    @property
    def samples_per_epoch(self) -> float:
        return self.tokens_per_epoch / self.form.seq_length

    def __len__(self) -> int:
        return self._length

    def padding(self) -> Sample:
        return self.form.padding()

    def __getitem__(self, index: int) -> Sample:
        return self.read(index, index)

    def read(self, index: int, sample_id: int) -> Sample:
        """Sample `index` in this source's reading order, under the name `sample_id`."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        s = self.form.seq_length
        if self._order is None:
            begin = int(load_index(self.plan, self._folder).samples[index]) * s
            pieces = self._shuffled(begin, begin + s + 1)
        else:
            begin = int(self._order[index]) * s
            pieces = self._in_file_order(begin, min(begin + s + 1, self.tokens_per_epoch))
        parts = list(pieces)
        tokens = _join(self.prefix, parts)
        labels = None if self.labels is None else _join(self.labels, parts)
        lengths = np.cumsum([0] + [length for _, _, length in parts]).tolist()
        starts = [at for at, (_, offset, _) in zip(lengths, parts, strict=False) if offset == 0]
        return self.form.make(tokens, labels, starts, sample_id)

    def _shuffled(self, begin: int, stop: int) -> Iterator[Piece]:
        """Parts of documents that make up tokens `begin:stop` of the shuffled stream."""
        index = load_index(self.plan, self._folder)
        epoch, offset = divmod(begin, self.tokens_per_epoch)
        wanted = stop - begin
        while wanted:
            ends = index.ends[epoch]
            place = int(np.searchsorted(ends, offset, side="right"))
            start = int(ends[place - 1]) if place else 0
            while wanted and place < len(ends):
                length = min(int(ends[place]) - offset, wanted)
                if length:
                    yield int(index.order[epoch, place]), offset - start, length
                wanted -= length
                offset = start = int(ends[place])
                place += 1
            epoch, offset = epoch + 1, 0

    def _in_file_order(self, begin: int, stop: int) -> Iterator[Piece]:
        """Parts of documents that make up tokens `begin:stop` of the part, as the file has them."""
        file = open_indexed(self.prefix)
        itemsize = file.dtype.itemsize
        origin = int(file.offsets[self.documents[0]]) // itemsize
        document = int(np.searchsorted(file.offsets, (begin + origin) * itemsize, side="right")) - 1
        while begin < stop:
            start = int(file.offsets[document]) // itemsize - origin
            length = min(start + int(file.sizes[document]), stop) - begin
            if length:
                yield document, begin - start, length
            begin += length
            document += 1


Piece = tuple[int, int, int]  # document, offset in it, length


def _join(prefix: str, parts: list[Piece]) -> NDArray[np.int64]:
    file = open_indexed(prefix)
    return np.concatenate([file.document(*part) for part in parts], dtype=np.int64)


def _check_labels(text: IndexedFile, labels: IndexedFile) -> None:
    if len(text) != len(labels) or not np.array_equal(text.sizes, labels.sizes):
        raise DataError(
            f"labels {labels.prefix} ({len(labels)} documents, {labels.num_tokens} tokens) do not go with text "
            f"{text.prefix} ({len(text)} documents, {text.num_tokens} tokens): every document needs one label per token"
        )
    if labels.dtype.kind != "i":
        raise DataError(f"labels {labels.prefix} are {labels.dtype}, which cannot hold -100; write them as int32")
