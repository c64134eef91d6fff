"""Meta's `tokenizer.model` of Llama 3: base64 token and rank per line, through `tiktoken`.

The ids are those of Meta's own code also for very long lines: like it, texts are cut every 400,000 characters and
runs of more than 25,000 characters with or without whitespace are cut, because the splitting expression would run
out of stack. A `tokenizer.json` of the same vocabulary does not cut, and differs at such places only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import NDArray

from megatron.tokenizer.base import Tokenizer, TokenizerError
from megatron.tokenizer.llama3 import SPECIAL_TOKENS, SPLIT_PATTERN

MAX_TEXT = 400_000
MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class TiktokenTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        ranks = read_ranks(path)
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self._encoding = tiktoken.Encoding(
            name=path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def _encode(self, text: str) -> list[int]:
        return [i for piece in pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def _encode_arrays(self, texts: list[str]) -> list[NDArray[np.integer]]:
        encode = self._encoding.encode_to_numpy
        return [np.concatenate([encode(part, disallowed_special=()) for part in pieces(text)]) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))

    @cached_property
    def fingerprint(self) -> str:
        rule = "\n".join((SPLIT_PATTERN, *SPECIAL_TOKENS)).encode()
        return "sha256:" + hashlib.sha256(self.path.read_bytes() + rule).hexdigest()


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> id of a `tokenizer.model` file. Raises TokenizerError naming the first bad line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{path}, line {number}: expected a base64 token and its rank, got {line[:40]!r}. "
                f"Is this a SentencePiece model? Then use tokenizer_type: SPMTokenizer"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise TokenizerError(
            f"{path}: {len(ranks)} tokens whose ranks are not 0 to {len(ranks) - 1} without gaps, or fewer than the "
            f"256 bytes; the file is truncated or not a Llama-3 tokenizer.model"
        )
    return ranks


def pieces(text: str) -> Iterator[str]:
    """The text in parts that tiktoken can split; one for all but very long texts."""
    if len(text) <= MAX_RUN:
        yield text
        return
    for offset in range(0, len(text), MAX_TEXT):
        part = text[offset : offset + MAX_TEXT]
        cuts = [
            cut
            for run in _RUN.finditer(part)
            if run.end() - run.start() > MAX_RUN
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)
        ]
        for start, stop in zip([0, *cuts], [*cuts, len(part)], strict=True):
            yield part[start:stop]
