"""One `.bin/.idx` pair as samples: the running pack for training, or once through for validation.

A source is read in epochs: its documents in a new random order each time, and the samples of an epoch in a random order
of their own. Everything is drawn epoch by epoch, so a longer run begins exactly like a shorter one. GPT-NeoX and
megatron-core shuffle all epochs at once, so train_iters changes the order from the first sample on.

With labels, samples without a target are left out, and counted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron.data.header import fingerprint
from megatron.data.index_cache import Arrays, CachedIndex
from megatron.data.indexed import DataError, IndexedFile, open_indexed
from megatron.data.sample import Sample, SampleForm, SampleSource
from megatron.data.targets import StreamTargets, describe_silent, refuse_silent

Piece = tuple[int, int, int]  # document, offset in it, length
DOCUMENTS, SAMPLES = 0, 1  # the two uses of the seed


def seeded_permutation(seed: int, epoch: int, use: int, count: int) -> NDArray[np.integer]:
    """Permutation of range(count), from the arguments alone: numpy has frozen RandomState's streams for good."""
    return np.random.RandomState([seed, epoch, use]).permutation(count)


class TokenSource(SampleSource):
    """Samples of a range of documents of tokens. Subclasses say which pieces of documents make a sample."""

    def __init__(
        self, prefix: str, form: SampleForm, documents: tuple[int, int] | None = None, labels: str | None = None
    ) -> None:
        """Raises DataError for files that cannot be used and ranges of fewer than two tokens."""
        self.prefix, self.labels, self.form = prefix, labels, form
        file = open_indexed(prefix)
        self.documents = documents or (0, len(file))
        if labels is not None:
            _check_labels(file, open_indexed(labels))
        start, stop = self.documents
        self.tokens = 0  # of one epoch
        if stop > start:
            last = stop - 1
            self.tokens = int(file.offsets[last] - file.offsets[start]) // file.dtype.itemsize + int(file.sizes[last])
        if self.tokens < 2:
            raise DataError(
                f"{prefix}: documents {start} to {stop} hold {self.tokens} tokens; nothing can be learned from them"
            )

    def index_identity(self, seed: int, **more: object) -> dict[str, object]:
        """What a cached index depends on besides its data: these settings, `more`, and the labels if there are any."""
        found = {"documents": self.documents, "seq_length": self.form.seq_length, "seed": seed, **more}
        if self.labels is not None:
            found |= {"labels": labels_identity(self.labels), "isolated": self.form.isolate_documents}
        return found

    @abstractmethod
    def pieces(self, index: int) -> list[Piece]:
        """The pieces of sample `index` in reading order: at most s + 1 tokens, every piece from another document."""

    def padding(self) -> Sample:
        return self.form.padding()

    def __getitem__(self, index: int) -> Sample:
        return self.read(index, index)

    def read(self, index: int, sample_id: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pieces = self.pieces(index)
        tokens = _join(self.prefix, pieces)
        labels = None if self.labels is None else _join(self.labels, pieces)
        starts = np.cumsum([0] + [length for _, _, length in pieces[:-1]]).tolist()
        return self.form.make(tokens, labels, starts, sample_id)


class RunningPack(TokenSource):
    """GPT-NeoX's `packed`: all epochs form an endless stream, and sample k is its tokens k*s to k*s + s.

    Neighbors share a token; samples cross the ends of documents and epochs. The samples that begin in an epoch are read
    in random order before any of the next.
    """

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
        self._seed, self._length = seed, samples
        self.samples_per_epoch = self.tokens / form.seq_length
        last_epoch = max(samples - 1, 0) * form.seq_length // self.tokens
        last_token = self.first_sample(last_epoch + 1) * form.seq_length  # of the last sample that begins in it
        self.epochs = last_token // self.tokens + 1
        label, length = f"{form.seq_length}s_{self.epochs}ep", {"epochs": self.epochs}
        if labels is not None:  # the number of epochs is known once the index is built
            label, length = f"{form.seq_length}s_{samples}_labels", {"samples": samples}
        identity = self.index_identity(seed, pack="packed", **length)
        self._index = CachedIndex(prefix, label, identity, self.build_index)
        self.epochs = len(self._index.arrays()["order"])

    def __len__(self) -> int:
        return self._length

    def first_sample(self, epoch: int) -> int:
        """Number of the first sample that begins in `epoch`."""
        return -(-epoch * self.tokens // self.form.seq_length)

    def build_index(self) -> Arrays:
        """`order` [epochs, documents]: documents in reading order; `ends` [epochs, documents]: where each ends, in
        tokens from the start of the epoch; `samples`: for the i-th sample read, which sample of the stream it is.
        With labels, samples without a target are in none of them; `left_out`: how many these are, and how many samples
        there are, in the first epoch."""
        if self.labels is not None:
            return self._build_taught(self.labels)
        order = np.stack([self._documents_of(epoch) for epoch in range(self.epochs)])
        total = self.first_sample(self.epochs)
        samples: NDArray[np.integer] = np.empty(total, np.uint32 if total < 2**32 else np.int64)
        for epoch in range(self.epochs):
            first, end = self.first_sample(epoch), self.first_sample(epoch + 1)
            samples[first:end] = first + seeded_permutation(self._seed, epoch, SAMPLES, end - first)
        return {"order": order, "ends": self._ends_of(order), "samples": samples}

    def _documents_of(self, epoch: int) -> NDArray[np.integer]:
        start, stop = self.documents
        order = seeded_permutation(self._seed, epoch, DOCUMENTS, stop - start) + start
        return order.astype(np.int32 if stop < 2**31 else np.int64)

    def _ends_of(self, order: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.cumsum(np.array(open_indexed(self.prefix).sizes)[order], axis=1, dtype=np.int64)

    def _build_taught(self, labels: str) -> Arrays:
        """The index with labels: as many epochs as needed until enough samples have a target."""
        refuse_silent(self.prefix, labels, self.documents, self.form)
        targets, s = StreamTargets(labels, self.form), self.form.seq_length
        orders: list[NDArray[np.integer]] = []
        samples: list[NDArray[np.integer]] = []
        count = 0
        while count < max(self._length, 1):
            epoch = len(samples)
            first, end = self.first_sample(epoch), self.first_sample(epoch + 1)
            while len(orders) <= epoch or targets.tokens <= end * s:  # the last sample reaches into the next epoch
                orders.append(self._documents_of(len(orders)))
                targets.add(orders[-1])
            taught = targets.with_targets(first, end)
            samples.append(taught[seeded_permutation(self._seed, epoch, SAMPLES, len(taught))])
            count += len(taught)
        left_out = [self.first_sample(1) - len(samples[0]), self.first_sample(1)]
        order = np.stack(orders)
        return {
            "order": order,
            "ends": self._ends_of(order),
            "samples": np.concatenate(samples).astype(np.int64),
            "left_out": np.array(left_out),
        }

    def describe_left_out(self) -> list[str]:
        """A line on samples without a target, which cutting anywhere can cause."""
        if self.labels is None:
            return []
        return describe_silent(
            self.prefix,
            self._index.arrays()["left_out"],
            "in the first epoch left out",
            "nothing to learn; pack_impl: packed cuts documents anywhere",
        )

    def pieces(self, index: int) -> list[Piece]:
        arrays = self._index.arrays()
        return list(self._stream(arrays, int(arrays["samples"][index]) * self.form.seq_length))

    def _stream(self, arrays: Arrays, begin: int) -> Iterator[Piece]:
        """Pieces of the s + 1 tokens of the stream from `begin` on."""
        epoch, offset = divmod(begin, self.tokens)
        wanted = self.form.seq_length + 1
        while wanted:
            ends = arrays["ends"][epoch]
            place = int(np.searchsorted(ends, offset, side="right"))
            start = int(ends[place - 1]) if place else 0
            while wanted and place < len(ends):
                length = min(int(ends[place]) - offset, wanted)
                if length:
                    yield int(arrays["order"][epoch, place]), offset - start, length
                wanted -= length
                offset = start = int(ends[place])
                place += 1
            epoch, offset = epoch + 1, 0


class OncePacked(TokenSource):
    """Validation: the documents once, in the order of the file, cut every s tokens; the last sample is padded.

    Every token is there exactly once; with labels, every target. The samples are read in a fixed random order, so that
    the first few are representative.
    """

    def __init__(
        self,
        prefix: str,
        form: SampleForm,
        seed: int,
        documents: tuple[int, int] | None = None,
        labels: str | None = None,
    ) -> None:
        super().__init__(prefix, form, documents, labels)
        self._seed = seed
        self._left_out = np.zeros(2, np.int64)  # samples without a target, and samples
        if labels is None:
            self._order = seeded_permutation(seed, 0, SAMPLES, self._samples)
        else:
            identity = self.index_identity(seed, pack="once")
            index = CachedIndex(prefix, f"{form.seq_length}s_once_labels", identity, self.build_index).arrays()
            self._order, self._left_out = index["samples"], index["left_out"]
        self.samples_per_epoch = len(self._order)

    @property
    def _samples(self) -> int:
        return -(-(self.tokens - 1) // self.form.seq_length)

    def build_index(self) -> Arrays:
        """`samples`: those with a target, in the order of reading; `left_out`: how many have none, of how many."""
        assert self.labels is not None
        refuse_silent(self.prefix, self.labels, self.documents, self.form)
        targets = StreamTargets(self.labels, self.form)
        targets.add(range(*self.documents))
        taught = targets.with_targets(0, self._samples)
        order = taught[seeded_permutation(self._seed, 0, SAMPLES, len(taught))]
        return {"samples": order, "left_out": np.array([self._samples - len(taught), self._samples])}

    def describe_left_out(self) -> list[str]:
        """A line on samples without a target."""
        why = "nothing to measure; pack_impl: packed cuts documents anywhere"
        return describe_silent(self.prefix, self._left_out, "left out", why)

    def __len__(self) -> int:
        return len(self._order)

    def pieces(self, index: int) -> list[Piece]:
        begin = int(self._order[index]) * self.form.seq_length
        return list(self._in_file_order(begin, min(begin + self.form.seq_length + 1, self.tokens)))

    def _in_file_order(self, begin: int, stop: int) -> Iterator[Piece]:
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


def labels_identity(prefix: str) -> str:
    """A text that changes with the lengths of the documents and with the labels."""
    found = fingerprint(prefix)
    return f"{found['hash']} {found['content']}"


def _join(prefix: str, pieces: list[Piece]) -> NDArray[np.int64]:
    file = open_indexed(prefix)
    return np.concatenate([file.document(*piece) for piece in pieces], dtype=np.int64)


def _check_labels(text: IndexedFile, labels: IndexedFile) -> None:
    if len(text) != len(labels) or not np.array_equal(text.sizes, labels.sizes):
        raise DataError(
            f"labels {labels.prefix} ({len(labels)} documents, {labels.num_tokens} tokens) do not go with text "
            f"{text.prefix} ({len(text)} documents, {text.num_tokens} tokens): every document needs one label per token"
        )
    if labels.dtype.kind != "i":
        raise DataError(f"labels {labels.prefix} are {labels.dtype}, which cannot hold -100; write them as int32")
