"""How much of each benchmark question occurs in one place of a document.

Text is folded to lower-case letters and digits, so that case, punctuation, spaces, line breaks, hyphenation and
ligatures make no difference, and characters that OCR confuses are mapped to one. The comparison uses runs of eight
bytes (shingles) of the folded text: a damaged character affects at most eight of them, whereas word n-grams lose words.

A question's score in a document is the fraction of its shingles that occur within one window of the document, weighted
by how rare they are among the questions: "which of the following" carries no information. The window is slightly longer
than the question, and order within it does not matter, so that shuffled options count in full.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHINGLE = 8  # bytes: one uint64
LEAST_SHINGLES = 16  # shorter texts are no evidence
_WINDOW, _WINDOW_EXTRA = (
    1.25,
    48,
)  # relative to a question's folded bytes; leaves room for option labels and page breaks
_FILTER_BITS = 22
_MIX = np.uint64(0x9E3779B97F4A7C15)

_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")
_CONFUSED = str.maketrans({"0": "o", "1": "l", "i": "l", "j": "l", "5": "s", "8": "b", "6": "b", "9": "g", "q": "g"})


def fold(text: str) -> bytes:
    """Lower-case letters and digits of a text in UTF-8, with look-alikes mapped to one character."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return _NOT_ALPHANUMERIC.sub("", plain).translate(_CONFUSED).encode()


def shingles(folded: bytes) -> NDArray[np.uint64]:
    """Every run of eight bytes, in order; empty for a shorter text."""
    count = len(folded) - SHINGLE + 1
    if count < 1:
        return np.empty(0, np.uint64)
    data = np.frombuffer(folded, np.uint8)
    result = np.zeros(count, np.uint64)
    for place in range(SHINGLE):
        result |= data[place : place + count].astype(np.uint64) << np.uint64(8 * place)
    return result


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A benchmark question; `name` identifies it in reports."""

    name: str
    question: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Overlap:
    """A question found in a document: `score` in [0, 1], and the window's position in the folded text."""

    question: int
    score: float
    start: int
    stop: int


@dataclass(frozen=True)
class _Text:
    """One text to search for: a question alone, or with its options."""

    question: int
    window: int  # folded bytes
    weight: float  # of all its shingles


class QuestionIndex:
    """Searches a document for many questions at once."""

    def __init__(self, questions: Sequence[BenchmarkQuestion]) -> None:
        self.questions = list(questions)
        self.unsearchable: list[int] = []  # too short to be evidence
        self._texts: list[_Text] = []
        contents: list[NDArray[np.uint64]] = []
        for number, question in enumerate(self.questions):
            found = _searchable_texts(question)
            if not found:
                self.unsearchable.append(number)
            for window, content in found:
                self._texts.append(_Text(number, window, 0.0))
                contents.append(content)
        self._build(contents)

    def _build(self, contents: list[NDArray[np.uint64]]) -> None:
        """Build the sorted shingles, the texts and weight of each, and a filter that rejects most non-matches."""
        flat = np.concatenate(contents) if contents else np.empty(0, np.uint64)
        owner = np.repeat(np.arange(len(contents)), [len(content) for content in contents])
        order = np.argsort(flat, kind="stable")
        self._shingles, first = np.unique(flat[order], return_index=True)
        self._owners = owner[order]
        self._first = np.append(first, len(flat))
        asked = np.array([text.question for text in self._texts], np.int64)[self._owners]
        self._weights = np.array(
            [_rarity(len(set(asked[low:high])), len(self.questions)) for low, high in _pairs(self._first)]
        )
        totals = np.zeros(len(self._texts))
        np.add.at(totals, self._owners, np.repeat(self._weights, np.diff(self._first)))
        self._texts = [_Text(t.question, t.window, float(w)) for t, w in zip(self._texts, totals, strict=True)]
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[_slot(self._shingles)] = True

    def find(self, text: str, least: float) -> list[Overlap]:
        """Questions whose score in a document is at least `least`, each at its best position, best first."""
        # The shingles of the document that occur in any question.
        found = shingles(fold(text))
        positions = np.flatnonzero(self._filter[_slot(found)])
        places = np.searchsorted(self._shingles, found[positions])
        known = places < len(self._shingles)
        known[known] = self._shingles[places[known]] == found[positions[known]]
        positions, places = positions[known], places[known]
        if not len(positions):
            return []
        # One row per (occurrence, text with that shingle), grouped by text.
        repeats = self._first[places + 1] - self._first[places]
        rows = np.repeat(np.arange(len(places)), repeats)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        texts = self._owners[self._first[places][rows] + within]
        order = np.argsort(texts, kind="stable")
        texts, rows = texts[order], rows[order]
        # For each text with enough weight in the document, its best window.
        best: dict[int, Overlap] = {}
        for low, high in _pairs(np.append(np.unique(texts, return_index=True)[1], len(texts))):
            text_ = self._texts[texts[low]]
            hits = rows[low:high]
            distinct = np.unique(places[hits])
            if self._weights[distinct].sum() < least * text_.weight:
                continue
            overlap = self._best_window(text_, positions[hits], places[hits])
            before = best.get(text_.question)
            if overlap.score >= least and (before is None or overlap.score > before.score):
                best[text_.question] = overlap
        return sorted(best.values(), key=lambda overlap: (-overlap.score, overlap.question))

    def _best_window(self, text: _Text, positions: NDArray[np.int64], places: NDArray[np.int64]) -> Overlap:
        """The window with the largest part of a text; repeated shingles count once."""
        inside: dict[int, int] = {}
        weight = best = 0.0
        start, span = 0, (0, 0)
        weights = dict(zip(places.tolist(), self._weights[places].tolist(), strict=True))
        for stop, place in enumerate(places.tolist()):
            if place not in inside:
                weight += weights[place]
            inside[place] = inside.get(place, 0) + 1
            # Shrink the window from the left until it is short enough.
            while positions[stop] - positions[start] > text.window:
                left = int(places[start])
                inside[left] -= 1
                if not inside[left]:
                    del inside[left]
                    weight -= weights[left]
                start += 1
            if weight > best:
                best, span = weight, (int(positions[start]), int(positions[stop]) + SHINGLE)
        return Overlap(text.question, min(1.0, best / text.weight), *span)


def _searchable_texts(question: BenchmarkQuestion) -> list[tuple[int, NDArray[np.uint64]]]:
    """(window, shingles) of the question alone and of the question with its options, if they are long enough.

    No shingle spans two parts, because options may be in any order.
    """
    parts = [fold(part) for part in (question.question, *question.options)]
    texts = []
    for chosen in [parts[:1], parts] if len(parts) > 1 else [parts]:
        content = np.unique(np.concatenate([shingles(part) for part in chosen]))
        if len(content) >= LEAST_SHINGLES:
            texts.append((int(_WINDOW * sum(map(len, chosen))) + _WINDOW_EXTRA, content))
    return texts


def _rarity(questions_with_it: int, questions: int) -> float:
    """Weight of a shingle: 1 if it occurs in one question only, 0 if in all."""
    if questions < 2:
        return 1.0
    return math.log(questions / questions_with_it) / math.log(questions)


def _slot(values: NDArray[np.uint64]) -> NDArray[np.intp]:
    with np.errstate(over="ignore"):
        return ((values * _MIX) >> np.uint64(64 - _FILTER_BITS)).astype(np.intp)


def _pairs(bounds: NDArray[np.int64]) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def excerpt(text: str, overlap: Overlap) -> str:
    """The part of a document in which a question was found."""
    place, begin = 0, 0
    for index, character in enumerate(text):
        if place <= overlap.start:
            begin = index
        place += len(fold(character))
        if place >= overlap.stop:
            return text[begin : index + 1]
    return text[begin:]
