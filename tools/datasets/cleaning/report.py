"""The report of a cleaning: why each document was dropped, counts for the corpus, and examples of each kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.datasets.cleaning.duplicates import Signature
from tools.datasets.cleaning.rules import Rules

EXAMPLES = 4  # per rule and kind of repair on the page


@dataclass(frozen=True)
class Drop:
    """Why a document was dropped: the rule, the measured value and the limit."""

    rule: str
    value: float
    limit: float
    like: tuple[str, str, int] | None = None  # file, unit and number of the earlier document, for duplicates


@dataclass
class Document:
    """One record after cleaning by a worker."""

    number: int  # of the record in its file, from 1
    start: str  # its first characters
    before: int  # characters
    after: int
    repaired: bool  # ftfy changed something
    loops: int  # characters cut
    line: bytes | None  # for the output; None if dropped
    drop: Drop | None
    signature: Signature | None
    perplexity: float | None
    texts: tuple[str, str] | None  # before and after, if this is one of the block's examples

    @property
    def kind(self) -> str | None:
        """The kind of example that this document could be."""
        if self.drop is not None:
            return self.drop.rule
        return "loops" if self.loops else "unicode" if self.repaired else None


@dataclass(order=True)
class Example:
    luck: bytes
    where: str = field(compare=False)
    before: str = field(compare=False)
    after: str = field(compare=False)
    drop: Drop | None = field(compare=False)
    earlier: str | None = field(default=None, compare=False)  # the earlier text of a duplicate


@dataclass
class Report:
    """Statistics of a cleaned corpus; counts of documents unless named otherwise."""

    rules: Rules
    inputs: list[str]
    output: str
    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    unreadable: int = 0
    repaired: int = 0
    looping: int = 0
    loop_characters: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_characters: Counter[str] = field(default_factory=Counter)
    perplexities: list[float] = field(default_factory=list)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def count(self, document: Document) -> None:
        self.documents += 1
        self.characters += document.before
        self.repaired += document.repaired
        self.looping += document.loops > 0
        self.loop_characters += document.loops
        if document.perplexity is not None:
            self.perplexities.append(document.perplexity)
        if document.drop is None:
            self.kept += 1
            self.kept_characters += document.after
        else:
            self.dropped[document.drop.rule] += 1
            self.dropped_characters[document.drop.rule] += document.before

    def show(self, kind: str, example: Example) -> None:
        lot = self.examples.setdefault(kind, [])
        lot.append(example)
        lot.sort()
        del lot[EXAMPLES:]

    def wants(self, kind: str, chance: bytes) -> bool:
        lot = self.examples.get(kind, [])
        return len(lot) < EXAMPLES or chance < lot[-1].luck

    def perplexity_quantiles(self) -> dict[str, float]:
        if not self.perplexities:
            return {}
        import numpy as np

        marks = [0, 5, 25, 50, 75, 90, 95, 98, 99, 100]
        return dict(zip(map(str, marks), np.percentile(self.perplexities, marks).round(3).tolist(), strict=True))

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            **{
                name: getattr(self, name)
                for name in (
                    *("inputs", "output", "documents", "characters", "kept", "kept_characters", "unreadable"),
                    *("repaired", "looping", "loop_characters"),
                )
            },
            "dropped": dict(sorted(self.dropped.items())),
            "dropped_characters": dict(sorted(self.dropped_characters.items())),
            "perplexity_percentiles": self.perplexity_quantiles(),
            "rules": {name: value for name, value in asdict(self.rules).items() if value != float("inf")},
        }
