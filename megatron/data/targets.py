"""Which samples of a stream of documents have a target: a learned label after their first token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import DataError, open_indexed
from megatron.data.sample import SampleForm


class StreamTargets:
    """Sample k learns tokens k*s + 1 to k*s + s of the stream; documents are added in its order."""

    def __init__(self, labels: str, form: SampleForm) -> None:
        self._file, self._form = open_indexed(labels), form
        self._teaches = np.zeros(1, bool)  # by sample; grows
        self.tokens = 0  # of the stream so far

    def add(self, documents: Iterable[int]) -> None:
        for document in documents:
            learned = np.flatnonzero(self._file.document(int(document)) >= 0)
            if self._form.isolate_documents:
                learned = learned[learned > 0]  # nothing precedes the first token of a document
            places = learned + self.tokens
            self.tokens += int(self._file.sizes[document])
            wanted = self.tokens // self._form.seq_length + 1
            if wanted > len(self._teaches):
                self._teaches = np.concatenate([self._teaches, np.zeros(wanted, bool)])
            self._teaches[(places[places > 0] - 1) // self._form.seq_length] = True

    def with_targets(self, first: int, end: int) -> NDArray[np.intp]:
        """The samples first to end - 1 that have a target. All of their documents must have been added."""
        return np.flatnonzero(self._teaches[first:end]) + first


def refuse_silent(prefix: str, labels: str, documents: tuple[int, int], form: SampleForm) -> None:
    """Raise DataError if no document has a target."""
    file, behind = open_indexed(labels), int(form.isolate_documents)
    if not any((file.document(document, behind, None) >= 0).any() for document in range(*documents)):
        raise DataError(f"{prefix}: labels {labels} have no target: nothing can be learned")


def describe_silent(prefix: str, counts: NDArray[np.integer], what: str, why: str) -> list[str]:
    """A line for the log. `counts`: samples without a target, and samples."""
    silent, count = counts.tolist()
    if not silent:
        return []
    share = silent / max(count, 1)
    return [f"{prefix}: {silent:,} samples of {count:,} ({share:.2%} of the tokens) {what}: no target in them, {why}"]
