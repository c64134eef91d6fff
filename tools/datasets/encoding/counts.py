"""A table that accounts for the records of each source, printed by `preprocess_sft.py` and `inspect_data.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.common.columns import align_columns
from megatron.data.header import ConversationCounts, DataHeader

MAX_KEYS = 20  # unknown keys shown by name


@dataclass(frozen=True)
class SourceSummary:
    name: str
    counts: ConversationCounts
    documents: int
    tokens: int
    learned: int

    def rows(self) -> list[tuple[str, str]]:
        """(description, count) rows in the order of processing."""
        counts = self.counts
        rows = [("records read", f"{counts.records:,}")]
        rows += [(f"format {name}", f"{count:,}") for name, count in counts.formats.items()]
        rows += [(f"dropped: {rule}", f"{count:,}") for rule, count in counts.dropped.items()]
        unknown = list(counts.unknown_keys.items())
        rows += [(f"unknown key: {key}", f"{count:,}") for key, count in unknown[:MAX_KEYS]]
        if len(unknown) > MAX_KEYS:
            rows.append((f"unknown keys: {len(unknown) - MAX_KEYS} more", ""))
        rows.append(("conversations written", f"{self.documents:,}"))
        rows.append(("tokens", f"{self.tokens:,}"))
        rows.append(("learned tokens", f"{self.learned:,} ({self.learned / max(self.tokens, 1):.1%})"))
        if self.documents:
            longer = [(length, count) for length, count in counts.longer_than.items() if count]
            if not longer and counts.longer_than:
                rows.append((f"longer than a sample of {min(map(int, counts.longer_than)):,} tokens", "0"))
            rows += [
                (f"longer than a sample of {int(length):,} tokens", f"{count:,} ({count / self.documents:.1%})")
                for length, count in longer
            ]
        return rows


def summary_of(name: str, header: DataHeader) -> SourceSummary | None:
    """The counts in a header; None if it has none, or the data are not conversations."""
    if header.chat is None or header.chat.counts is None:
        return None
    return SourceSummary(name, header.chat.counts, header.documents, header.tokens, header.chat.learned_tokens)


def summary_table(sources: Sequence[SourceSummary]) -> str:
    """All sources in one table, one fact per line."""
    rows = [("source", "", "")]
    for source in sources:
        rows += [("" if number else source.name, *row) for number, row in enumerate(source.rows())]
    return "\n".join(align_columns(rows, right=[2]))
