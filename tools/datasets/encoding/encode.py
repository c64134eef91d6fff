"""The part of preprocessing that runs in every worker: turns a block of records into token bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.tokenizer import Tokenizer
from tools.datasets.encoding.records import Block, RecordError, read_record, text_of


class BadEntry(NamedTuple):
    """An unusable record: the rule it breaks, for counting, and a message with file and line."""

    rule: str
    message: str


@dataclass
class Encoded:
    """The documents of one key in one block."""

    tokens: bytes = b""
    sizes: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    max_token: int = -1
    text_bytes: int = 0
    learned: int = 0  # supervised tokens, if the document has labels
    empty: int = 0
    bad: list[BadEntry] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # valid records without a sample, by rule
    unknown: Counter[str] = field(default_factory=Counter)  # unused fields
    longer: Counter[str] = field(default_factory=Counter)  # documents longer than a sample, by its length in tokens


@dataclass(frozen=True)
class TextEncoder:
    """The encoder of one worker: tokenizer, fields to read, and the framing of documents."""

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
                record = read_record(block, position)
                values = [] if record is None else [text_of(record, key) for key in self.keys]
            except RecordError as error:
                for result in results:
                    result.bad.append(BadEntry(error.rule, f"{block.where(position)}: {error}"))
                continue
            if record is not None:
                results[0].unknown.update(key for key in record if key not in self.keys)
            for value, result, kept in zip(values, results, texts, strict=False):
                kept.append(self._repaired(value))
                if not kept[-1].strip():
                    kept.pop()
                    result.empty += 1
        for kept, result in zip(texts, results, strict=True):
            self._encode(kept, result)
        return results

    def _repaired(self, text: str) -> str:
        if not self.ftfy:
            return text
        import ftfy

        return ftfy.fix_text(text)

    def _encode(self, texts: list[str], result: Encoded) -> None:
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
