"""Exact and near duplicates in a whole corpus: the first occurrence is kept.

Signatures are computed in the workers; one process queries the index in the order of the corpus, so the result does not
depend on the number of workers. Near duplicates are found by MinHash and locality-sensitive hashing (`datasketch`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import DataError
from tools.datasets.cleaning.repetition import ngram_hashes, word_hashes

PERMUTATIONS = 128
SHINGLE = 5  # words
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Signature:
    """The signature of a text in the index."""

    digest: bytes  # of its words
    minhash: NDArray[np.unsignedinteger] | None  # [PERMUTATIONS]; None without near-duplicate detection


def signature(text: str, near: bool) -> Signature:
    """Signature of a text's words, in lower case and without punctuation."""
    words = _WORD.findall(text.lower())
    digest = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if not near:
        return Signature(digest, None)
    shingles = ngram_hashes(word_hashes(words), min(SHINGLE, max(1, len(words))))
    return Signature(digest, _minhash(np.unique(shingles) >> np.uint64(32)).hashvalues)


def _minhash(values: NDArray[np.uint64] | None = None, signature: NDArray[Any] | None = None) -> Any:
    """datasketch's MinHash of 32-bit values, or one that wraps an existing signature."""
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise DataError("near duplicates need the package datasketch (pip install .[data])") from error
    result = MinHash(PERMUTATIONS, hashfunc=int, hashvalues=signature, scheme="affine32")
    if values is not None:
        result.update_batch(values.tolist())
    return result


@dataclass
class Index:
    """The texts kept so far, by number. About 4 KB each with near-duplicate detection, 0.2 KB without."""

    exact: bool
    similarity: float  # Jaccard; 0 turns near-duplicate detection off
    _digests: dict[bytes, int] = field(default_factory=dict)
    _minhashes: dict[int, NDArray[Any]] = field(default_factory=dict)
    _lsh: Any = None

    def __post_init__(self) -> None:
        if self.similarity:
            from datasketch import MinHashLSH

            self._lsh = MinHashLSH(self.similarity, PERMUTATIONS, hashfunc=_band)

    def find(self, text: Signature) -> tuple[str, float, int] | None:
        """(rule, similarity, number of the earlier text) if this text is a duplicate."""
        if self.exact and text.digest in self._digests:
            return "exact_duplicate", 1.0, self._digests[text.digest]
        if self._lsh is None:
            return None
        candidates = self._lsh.query(_minhash(signature=text.minhash))
        alike = [(float(np.mean(self._minhashes[number] == text.minhash)), -number) for number in candidates]
        best = max(alike, default=(0.0, 0))
        return ("near_duplicate", best[0], -best[1]) if best[0] >= self.similarity else None

    def add(self, number: int, text: Signature) -> None:
        self._digests.setdefault(text.digest, number)
        if self._lsh is not None:
            self._lsh.insert(number, _minhash(signature=text.minhash), check_duplication=False)
            assert text.minhash is not None
            self._minhashes[number] = text.minhash


def _band(values: bytes) -> bytes:
    return hashlib.blake2b(values, digest_size=8).digest()
