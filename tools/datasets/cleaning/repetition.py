"""Repetition in a text: loops, which are cut, and the fraction of repeated text, which is measured.

Everything operates on hashes of words in numpy arrays, so a document of n words takes a few hundred passes of length n
and no Python loop over its words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\S+")
_LINES = re.compile(r"\n+")
_PARAGRAPHS = re.compile(r"\n\s*\n")
LOOP_WORDS = 100  # longest period of a loop, in words
LOOP_CHARACTERS = 32  # longest period, in characters, within text without spaces
_MIX = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(words: Sequence[str]) -> NDArray[np.uint64]:
    """A 64-bit hash of each word, the same in every process."""
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hashes of the runs of n words, shape [len(words) - n + 1]; empty if there are fewer words."""
    count = max(0, len(words) - n + 1)
    result = np.zeros(count, np.uint64)
    for i in range(n):
        result = result * _MIX + words[i : i + count]
    return result


def find_loops(text: str, repeats: int, characters: int) -> list[tuple[int, int]]:
    """Spans to cut so that one repetition of each loop is kept. A loop is a sequence of up to LOOP_WORDS words (or
    LOOP_CHARACTERS characters) repeated at least `repeats` times in a row, at least `characters` long in total.
    Spans are sorted and do not overlap.
    """
    if not repeats:
        return []
    matches = list(_WORD.finditer(text))
    begins = np.array([m.start() for m in matches], np.int64)
    ends = np.array([m.end() for m in matches], np.int64)
    words = word_hashes([m.group() for m in matches])
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = letters.copy()  # no two white spaces are equal here: repetitions with spaces are found as words
    inside[_spaces(begins, ends, len(text))] = np.arange(0x110000, 0x110000 + len(text) - int((ends - begins).sum()))
    runs = [
        (int(begins[first]), int(ends[kept - 1]), int(ends[stop - 1]))
        for first, kept, stop in _runs(words, range(1, LOOP_WORDS + 1), repeats)
    ]
    runs += _runs(letters, range(1, 2), repeats)
    runs += _runs(inside, range(2, LOOP_CHARACTERS + 1), repeats)
    spans: list[tuple[int, int]] = []
    taken = np.zeros(len(text), bool)
    for first, kept, stop in sorted(runs, key=lambda run: (run[0] - run[2], run[1] - run[0])):
        if (
            stop - first >= characters and not taken[first:stop].any()
        ):  # prefer the longest span, then the shortest period
            taken[first:stop] = True
            spans.append((kept, stop))
    return sorted(spans)


def _spaces(begins: NDArray[np.int64], ends: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    """Mask of the characters that are not part of a word."""
    edges = np.zeros(length + 1, np.int64)
    edges[begins] += 1
    edges[ends] -= 1
    return np.cumsum(edges[:-1]) == 0


def _runs(items: NDArray[np.unsignedinteger], periods: range, repeats: int) -> Iterator[tuple[int, int, int]]:
    """(start, end of the first repetition, end of the last whole repetition) of each run with some period."""
    for period in periods:
        if period * repeats > len(items):
            return
        same = items[period:] == items[:-period]
        if np.count_nonzero(same) < (repeats - 1) * period:
            continue
        edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
        begins, ends = edges[::2], edges[1::2]
        long = ends - begins >= (repeats - 1) * period
        for begin, end in zip(begins[long].tolist(), ends[long].tolist(), strict=True):
            yield begin, begin + period, begin + ((end - begin) // period + 1) * period


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def cut(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without the spans."""
    starts = [0, *(end for _, end in spans)]
    ends = [*(begin for begin, _ in spans), len(text)]
    return "".join(text[begin:end] for begin, end in zip(starts, ends, strict=True))


def repeated_shares(text: str) -> dict[str, float]:
    """Gopher's measures (Rae et al. 2021, appendix A.1.1), by the names of `Rules` without `max_`.

    A line, paragraph or sequence is a duplicate if it occurred earlier in the text; the first one does not count.
    """
    shares = {}
    for name, pattern in (("line", _LINES), ("paragraph", _PARAGRAPHS)):
        parts = [part for part in (piece.strip() for piece in pattern.split(text)) if part]
        sizes = np.array([len(part) for part in parts], np.int64)
        again = _again(word_hashes(parts))
        shares[f"duplicate_{name}s"] = float(again.mean()) if len(parts) else 0.0
        shares[f"duplicate_{name}_characters"] = float(sizes[again].sum() / sizes.sum()) if len(parts) else 0.0
    words = _WORD.findall(text)
    sizes = np.array([len(word) for word in words], np.int64)
    total = max(1, int(sizes.sum()))
    hashes = word_hashes(words)
    for n in range(2, 11):
        shares[f"{'top' if n < 5 else 'duplicate'}_{n}gram"] = float(sizes[_in_repeated(hashes, n)].sum() / total)
    return shares


def repeated_spans(text: str, name: str) -> list[tuple[int, int]]:
    """The text counted by one of the measures, as spans."""
    if name.endswith("gram"):
        words = list(_WORD.finditer(text))
        places = _in_repeated(word_hashes([word.group() for word in words]), int(name.split("_")[-1][:-4]))
        spans = [word.span() for word, place in zip(words, places.tolist(), strict=True) if place]
        return _union([(begin, end + 1) for begin, end in spans])
    pattern = _PARAGRAPHS if "paragraph" in name else _LINES
    begins = [0, *(gap.end() for gap in pattern.finditer(text))]
    ends = [*(gap.start() for gap in pattern.finditer(text)), len(text)]
    spans = [(begin, end) for begin, end in zip(begins, ends, strict=True) if text[begin:end].strip()]
    again = _again(word_hashes([text[begin:end].strip() for begin, end in spans]))
    return [span for span, place in zip(spans, again.tolist(), strict=True) if place]


def _in_repeated(words: NDArray[np.uint64], n: int) -> NDArray[np.bool_]:
    """Mask of the words in the most frequent sequence of n words (n below 5), or in any repeated one (n from 5)."""
    grams = ngram_hashes(words, n)
    if len(grams) < 2:
        return np.zeros(len(words), bool)
    where = _most_frequent(grams) if n < 5 else _again(grams)
    edges = np.zeros(len(words) + 1, np.int64)  # +1 at the start of a sequence, -1 after its end
    edges[:-n][where] += 1
    edges[n:][where] -= 1
    return np.cumsum(edges[:-1]) > 0


def _again(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Mask of values that occurred earlier."""
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def _most_frequent(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Mask of the most frequent value; all false if every value occurs once."""
    values, counts = np.unique(hashes, return_counts=True)
    most = counts.argmax()
    return hashes == values[most] if counts[most] > 1 else np.zeros(len(hashes), bool)
