"""Samples of whole documents: padded instead of cut, as supervised fine-tuning needs them.

Three ways to fill a sample of s + 1 tokens (`pack_impl`): `unpacked` takes one document; `pack_until_overflow` takes
documents in random order until the next one would not fit; `best_fit` puts each document, longest first, where it
leaves the least room (best-fit decreasing), which wastes almost nothing. The rest of a sample is padding without
learned tokens; GPT-NeoX puts the first token of another document before it.

A document of more than s + 1 tokens is left out or, with `allow_chopped`, cut into pieces that overlap by one token, so
that all of it is learned. With labels, a document or piece without a target is left out. Both are counted.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron.data.index_cache import Arrays, CachedIndex
from megatron.data.indexed import DataError, open_indexed
from megatron.data.sample import SampleForm
from megatron.data.sources import DOCUMENTS, SAMPLES, Piece, TokenSource, labels_identity, seeded_permutation

Integers = NDArray[np.integer]
Packing = Literal["pack_until_overflow", "unpacked", "best_fit"]


class WholeDocuments(TokenSource):
    """`samples` samples over as many epochs as that takes, or (None) the documents once in the order of the file."""

    def __init__(
        self,
        prefix: str,
        form: SampleForm,
        seed: int,
        samples: int | None,
        packing: Packing,
        chop: bool = False,
        documents: tuple[int, int] | None = None,
        labels: str | None = None,
    ) -> None:
        super().__init__(prefix, form, documents, labels)
        self._seed, self._wanted, self._packing, self._chop = seed, samples, packing, chop
        identity = {
            "pack": packing,
            "documents": self.documents,
            "seq_length": form.seq_length,
            "seed": seed,
            "labels": None if labels is None else labels_identity(labels),
        }
        self._index = CachedIndex(
            prefix,
            f"{form.seq_length}s_{packing}",
            {**identity, "samples": samples, "chop": chop},
            self.build_index,
        )
        arrays = self._index.arrays()
        self.samples_per_epoch = int(arrays["epochs"][1])
        self._length = len(arrays["samples"]) if samples is None else samples

    def __len__(self) -> int:
        return self._length

    def describe_left_out(self) -> list[str]:
        """Lines for the log on documents that were left out or cut, with their shares."""
        counts = dict(zip(_COUNTS, self._index.arrays()["counts"].tolist(), strict=True))
        lines = []
        for number, tokens, why in (
            (
                "too_long",
                "too_long_tokens",
                f"longer than a sample of {self.form.seq_length} tokens and left out; allow_chopped: true cuts them",
            ),
            (
                "cut",
                "cut_tokens",
                f"longer than a sample of {self.form.seq_length} tokens and cut (allow_chopped: true)",
            ),
            ("silent", "silent_tokens", "left out: no target in them, nothing to learn"),
            ("short", "short_tokens", "left out: fewer than two tokens"),
        ):
            if counts[number]:
                what = "documents and pieces" if number == "silent" and counts["cut"] else "documents"
                lines.append(
                    f"{self.prefix}: {counts[number]:,} {what} of {counts['documents']:,} "
                    f"({counts[tokens] / max(counts['tokens'], 1):.2%} of the tokens) {why}"
                )
        return lines

    def build_index(self) -> Arrays:
        """`document`, `offset`, `length`: the pieces; `order`: pieces in the order of the bins they are put in,
        epoch by epoch; `bins`: where each bin begins in `order`; `epochs`: the first bin of each epoch;
        `samples`: for the i-th sample read, its bin."""
        start, stop = self.documents
        sizes = np.array(open_indexed(self.prefix).sizes[start:stop], np.int64)
        capacity = self.form.seq_length + 1
        # Cut or leave out long documents, and leave out those without a target.
        document, offset, length, counts = _cut(sizes, capacity, self._chop)
        if len(document) == 0:
            raise DataError(
                f"{self.prefix}: no document has 2 to {capacity} tokens; allow_chopped: true cuts longer ones"
            )
        if self.labels is not None:
            teaches = _have_targets(self.labels, document + start, offset, length)
            counts["silent"], counts["silent_tokens"] = int((~teaches).sum()), int(length[~teaches].sum())
            document, offset, length = document[teaches], offset[teaches], length[teaches]
            if len(document) == 0:
                raise DataError(f"{self.prefix}: labels {self.labels} have no target: nothing can be learned")
        # Fill bins epoch by epoch until there are enough samples.
        orders: list[Integers] = []
        samples: list[Integers] = []
        bins: list[Integers] = [np.zeros(1, np.int64)]
        epochs = [0]
        pieces_before = 0
        while epochs[-1] < (1 if self._wanted is None else self._wanted):
            epoch = len(orders)
            order = (
                np.arange(len(document))
                if self._wanted is None
                else seeded_permutation(self._seed, epoch, DOCUMENTS, len(document))
            )
            order, ends = _fill(order, length, capacity, self._packing)
            orders.append(order)
            bins.append(ends + pieces_before)
            samples.append(epochs[-1] + seeded_permutation(self._seed, epoch, SAMPLES, len(ends)))
            epochs.append(epochs[-1] + len(ends))
            pieces_before += len(order)
        return {
            "document": document + start,
            "offset": offset,
            "length": length,
            "order": np.concatenate(orders),
            "bins": np.concatenate(bins),
            "epochs": np.array(epochs),
            "samples": np.concatenate(samples),
            "counts": np.array([counts[name] for name in _COUNTS]),
        }

    def pieces(self, index: int) -> list[Piece]:
        arrays = self._index.arrays()
        bin_ = int(arrays["samples"][index])
        pieces = arrays["order"][arrays["bins"][bin_] : arrays["bins"][bin_ + 1]]
        return [(int(arrays["document"][p]), int(arrays["offset"][p]), int(arrays["length"][p])) for p in pieces]


_COUNTS = (
    *("documents", "tokens", "too_long", "too_long_tokens", "cut", "cut_tokens"),
    *("silent", "silent_tokens", "short", "short_tokens"),
)


def _have_targets(labels: str, document: Integers, offset: Integers, length: Integers) -> NDArray[np.bool_]:
    """Which pieces have a learned label after their first token."""
    file = open_indexed(labels)
    places = zip(document.tolist(), offset.tolist(), length.tolist(), strict=True)
    return np.array([int(file.document(d, o + 1, n - 1).max()) >= 0 for d, o, n in places], bool)


def _cut(sizes: Integers, capacity: int, chop: bool) -> tuple[Integers, Integers, Integers, dict[str, int]]:
    """Pieces (document, offset, length) of at most `capacity` tokens, and counts of `_COUNTS`.

    A document of one token has nothing to predict and is left out.
    """
    step = capacity - 1
    count = np.where(sizes < 2, 0, -(-(sizes - 1) // step))
    long = count > 1
    counts = dict.fromkeys(_COUNTS, 0) | {
        "documents": len(sizes),
        "tokens": int(sizes.sum()),
        "short": int((sizes < 2).sum()),
        "short_tokens": int(sizes[sizes < 2].sum()),
        ("cut" if chop else "too_long"): int(long.sum()),
        ("cut_tokens" if chop else "too_long_tokens"): int(sizes[long].sum()),
    }
    if not chop:
        count[long] = 0
    document = np.repeat(np.arange(len(sizes)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    offset = (np.arange(len(document)) - first) * step
    return document, offset, np.minimum(capacity, sizes[document] - offset), counts


def _fill(order: Integers, length: Integers, capacity: int, packing: Packing) -> tuple[Integers, Integers]:
    """Put the pieces into bins; returns (pieces bin by bin, where each bin ends among them)."""
    if packing == "unpacked":
        return order, np.arange(1, len(order) + 1)
    if packing == "pack_until_overflow":
        ends = np.cumsum(length[order])
        bin_ends = []
        place = filled = 0
        while place < len(order):
            place = int(np.searchsorted(ends, filled + capacity, side="right"))
            bin_ends.append(place)
            filled = int(ends[place - 1])
        return order, np.array(bin_ends)
    return _best_fit(order, length, capacity)


def _best_fit(order: Integers, length: Integers, capacity: int) -> tuple[Integers, Integers]:
    """Best-fit decreasing. Equal lengths keep the random order, so epochs differ.

    Bins are kept by the room they have left; `open_rooms` has one bit per room, so the tightest fit takes a few
    operations.
    """
    order = order[np.argsort(-length[order], kind="stable")]
    bin_of = np.empty(len(order), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms = 0
    bins = 0
    for place, size in enumerate(length[order].tolist()):
        fitting = open_rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            bin_ = with_room[room].pop()
            if not with_room[room]:
                open_rooms ^= 1 << room
        else:
            bin_, room = bins, capacity
            bins += 1
        bin_of[place] = bin_
        room -= size
        if room >= 2:
            with_room[room].append(bin_)
            open_rooms |= 1 << room
    by_bin = np.argsort(bin_of, kind="stable")
    return order[by_bin], np.cumsum(np.bincount(bin_of, minlength=bins))
