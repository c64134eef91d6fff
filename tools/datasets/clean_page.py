"""A page that shows what cleaning did: the figures, the rules, and documents before and after."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.datasets.clean import Report


def page(report: Report) -> str:
    parts = [f"<h1>{html.escape(report.output)}</h1>", f"<pre>{html.escape(table(report))}</pre>"]
    for kind, examples in sorted(report.examples.items()):
        parts.append(f"<h2>{html.escape(kind)}</h2>")
        for example in examples:
            parts.append(f"<h3>{html.escape(example.where)}</h3><pre>{html.escape(example.before[:1000])}</pre>")
    return "<!doctype html><meta charset=utf-8>" + "\n".join(parts)


def table(report: Report) -> str:
    """The figures as text."""
    rows = [("read", report.documents, report.characters), ("kept", report.kept, report.kept_characters)]
    rows += [
        (f"dropped by {rule}", count, report.dropped_characters[rule]) for rule, count in report.dropped.most_common()
    ]
    lines = [f"{'':<48}{'documents':>12}{'characters':>16}"]
    lines += [f"{name:<48}{documents:>12}{characters:>16}" for name, documents, characters in rows]
    lines.append(f"{'repaired (Unicode)':<48}{report.repaired:>12}")
    lines.append(f"{'with loops cut':<48}{report.looping:>12}{report.loop_characters:>16}")
    if report.unreadable:
        lines.append(f"{'unreadable':<48}{report.unreadable:>12}")
    quantiles = report.perplexity_quantiles()
    if quantiles:
        lines.append("perplexity  " + "  ".join(f"{mark} %: {value:.4g}" for mark, value in quantiles.items()))
    return "\n".join(lines)
