"""The part of cleaning that runs in every worker: turns a block of records into repaired documents, kept or dropped."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from dataclasses import dataclass, field
from typing import Any

from tools.datasets.cleaning.duplicates import signature
from tools.datasets.cleaning.perplexity import Perplexity
from tools.datasets.cleaning.repetition import cut, find_loops, repeated_shares
from tools.datasets.cleaning.report import EXAMPLES, Document, Drop
from tools.datasets.cleaning.rules import Rules
from tools.datasets.encoding.records import Block, RecordError, read_record, text_of

_STRANGE = re.compile("[\ufffd\ue000-\uf8ff]")  # the replacement character, and private-use characters from PDF fonts


@dataclass
class Cleaned:
    source: str
    unit: str
    documents: list[Document] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cleaner:
    """The cleaning of one worker; called with a block of records."""

    rules: Rules
    key: str
    perplexity: Perplexity | None

    def __call__(self, block: Block) -> Cleaned:
        result = Cleaned(block.source, block.unit)
        for position in range(len(block)):
            try:
                record = read_record(block, position)
                text = None if record is None else text_of(record, self.key)
            except RecordError as error:
                result.bad.append(f"{block.where(position)}: {error}")
                continue
            if record is not None and text is not None:
                result.documents.append(self._clean(block.first + position, text, _with_file(record, block.file)))
        keep_examples(block.source, result.documents)
        return result

    def _clean(self, number: int, text: str, record: dict[str, Any]) -> Document:
        rules = self.rules
        clean = text
        if rules.unicode:
            import ftfy

            clean = ftfy.fix_text(clean)
        repaired = clean != text
        spans = find_loops(clean, rules.loop_repeats, rules.loop_characters)
        loops, length = sum(end - begin for begin, end in spans), len(clean)
        clean = cut(clean, spans).strip()
        drop = self._judge(clean, loops / length if length else 0.0)
        perplexity = None
        if drop is None and self.perplexity is not None:
            perplexity = self.perplexity(clean)
            if perplexity > rules.max_perplexity:
                drop = Drop("max_perplexity", perplexity, rules.max_perplexity)
            elif perplexity < rules.min_perplexity:
                drop = Drop("min_perplexity", perplexity, rules.min_perplexity)
        return Document(
            number=number,
            start=clean[:80],
            before=len(text),
            after=len(clean),
            repaired=repaired,
            loops=loops,
            line=None
            if drop
            else json.dumps({**record, self.key: clean}, ensure_ascii=False, default=str).encode(errors="replace"),
            drop=drop,
            signature=None if drop else signature(clean, rules.near_duplicate > 0),
            perplexity=perplexity,
            texts=(text, clean),
        )

    def _judge(self, text: str, loops: float) -> Drop | None:
        """The first rule that the text breaks."""
        rules = self.rules
        if loops > rules.max_loops:
            return Drop("max_loops", loops, rules.max_loops)
        if len(text) < rules.min_characters:
            return Drop("min_characters", len(text), rules.min_characters)
        strange = len(_STRANGE.findall(text)) / len(text) if text else 0.0
        if strange > rules.max_replacement:
            return Drop("max_replacement", strange, rules.max_replacement)
        for name, share in repeated_shares(text).items():
            limit = getattr(rules, f"max_{name}")
            if share > limit:
                return Drop(f"max_{name}", share, limit)
        return None


def _with_file(record: dict[str, Any], file: str | None) -> dict[str, Any]:
    """Add the file's name to records from a folder, unless they have a field of that name."""
    return record if file is None or "file" in record else {**record, "file": file}


def luck(source: str, number: int) -> bytes:
    """A reproducible random key of a document; the documents with the smallest keys become examples."""
    return hashlib.blake2b(f"{source}\0{number}".encode(errors="replace"), digest_size=8).digest()


def keep_examples(source: str, documents: list[Document]) -> None:
    """Keep the texts of a few possible examples of each kind, and drop all others to save memory."""
    kinds: dict[str, list[tuple[bytes, int]]] = {}
    for i, document in enumerate(documents):
        if document.kind is not None:
            kinds.setdefault(document.kind, []).append((luck(source, document.number), i))
    chosen = {i for lot in kinds.values() for _, i in heapq.nsmallest(EXAMPLES, lot)}
    for i, document in enumerate(documents):
        if i not in chosen:
            document.texts = None
