"""One block of records -> token bytes. This is the part of preprocessing that runs in every worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron.tokenizer import Tokenizer
from tools.datasets.encoding.records import Block, read_record, text_of


@dataclass
class Encoded:
    """The documents of one key in one block."""

    tokens: bytes = b""
    sizes: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    max_token: int = -1
    text_bytes: int = 0
    learned: int = 0  # supervised tokens, where the document has labels
    empty: int = 0
    bad: list[str] = field(default_factory=list)  # one message per unreadable record


@dataclass(frozen=True)
class TextEncoder:
    """What a worker knows: the tokenizer, which fields to read and how a document is framed."""

    tokenizer: Tokenizer
    keys: Sequence[str]
    dtype: np.dtype
    bos: int | None
    eod: int | None
    ftfy: bool

    def __call__(self, block: Block) -> list[Encoded]:
        """Encoded documents for each key, in the order of the block."""
        results = [Encoded() for _ in self.keys]
        texts: list[list[str]] = [[] for _ in self.keys]
        for position in range(len(block)):
            try:
                values = self._fields(block, position)
            except ValueError as error:
                for result in results:
                    result.bad.append(f"{block.where(position)}: {error}")
                continue
            for value, result, kept in zip(values, results, texts, strict=True):
                if value:
                    kept.append(value)
                elif value is not None:
                    result.empty += 1
        for kept, result in zip(texts, results, strict=True):
            self._encode(kept, result)
        return results

    def _fields(self, block: Block, position: int) -> list[str | None]:
        """Text of each key; None for a blank line. Raises ValueError with the reason a record cannot be used."""
        record = read_record(block, position)
        if record is None:
            return [None] * len(self.keys)
        return [text_of(record, key) for key in self.keys]

    def _encode(self, texts: list[str], result: Encoded) -> None:
        if self.ftfy:
            import ftfy

            texts = [ftfy.fix_text(text) for text in texts]
        result.text_bytes = sum(len(text.encode(errors="replace")) for text in texts)
        before = np.array([] if self.bos is None else [self.bos], self.dtype)
        behind = np.array([] if self.eod is None else [self.eod], self.dtype)
        documents = self.tokenizer.encode_arrays(texts)
        if not documents:
            return
        parts = [part.astype(self.dtype) for ids in documents for part in (before, ids, behind)]
        joined = np.concatenate(parts)
        result.max_token = int(joined.max()) if len(joined) else -1
        result.tokens = joined.tobytes()
        result.sizes = np.array([len(ids) + len(before) + len(behind) for ids in documents], np.int32)
