"""A page that shows the effect of cleaning: counts, rules, and documents before and after."""

from __future__ import annotations

import dataclasses
import difflib
import html
import re
from collections.abc import Sequence

from tools.datasets.cleaning.repetition import find_loops, repeated_spans
from tools.datasets.cleaning.report import Example, Report
from tools.datasets.cleaning.rules import Rules

SHOWN = 900  # characters of a text
CONTEXT = 60  # characters around a change
CHANGES = 6  # changes shown per document
LONGEST = 300  # characters of one deletion that are shown
_PIECE = re.compile(r"\w+|\s+|[^\w\s]")
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --del: #e5534b33; --ins: #2da44e33; --mark: #d4a72c55 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem } p { margin: .3rem 0 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 } td, th { padding: .25rem .6rem; text-align: left }
tr { border-bottom: 1px solid var(--line) } .n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #4477aa; height: .7rem; min-width: 1px; border-radius: 2px } .bar.kept { background: #2da44e }
article { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; overflow: hidden }
article > header { background: var(--soft); padding: .3rem .8rem; font-size: .85rem }
pre { margin: 0; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
pre { font: 13px/1.45 ui-monospace, monospace }
.two { display: grid; grid-template-columns: 1fr 1fr } .two > pre + pre { border-left: 1px solid var(--line) }
del { background: var(--del) } ins { background: var(--ins); text-decoration: none }
mark { background: var(--mark); color: inherit }
.gap { color: #888 } a { color: inherit }
"""
TITLES = {
    "unicode": ("Unicode repaired", "before and after, except for white space at the edges"),
    "loops": ("Loops cut", "one repetition of each loop is kept; struck-out text was removed"),
}


def page(report: Report) -> str:
    """One self-contained HTML file."""
    inputs = ", ".join(report.inputs[:3]) + (f" and {len(report.inputs) - 3} more" if len(report.inputs) > 3 else "")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Cleaning of {_text(report.output)}</title><style>{STYLE}</style>",
        f"<h1>Cleaning of {_text(report.output)}</h1><p>from {_text(inputs)}",
        _figures(report),
    ]
    kinds = [*TITLES, *(name for name, _ in report.dropped.most_common())]
    for kind in kinds:
        if report.examples.get(kind):
            title, note = TITLES.get(kind) or (f"Dropped by {kind}", _describe(report.rules, kind))
            parts.append(f"<h2 id={kind}>{_text(title)}</h2><p class=gap>{_text(note)}")
            parts += [_article(kind, example, report.rules) for example in report.examples[kind]]
    return "\n".join(parts) + "\n"


def _figures(report: Report) -> str:
    """The table at the top."""
    most = max(1, report.documents)
    rows = [("kept", "", report.kept, report.kept_characters, "bar kept")]
    rows += [
        (f"<a href='#{rule}'>{rule}</a>", _describe(report.rules, rule), count, report.dropped_characters[rule], "bar")
        for rule, count in report.dropped.most_common()
    ]
    lines = [
        f"<tr><td>{name}<td class=gap>{_text(note)}<td class=n>{count:,}<td class=n>{count / most:.2%}"
        f"<td class=n>{characters:,}<td style='width:7rem'><div class='{bar}' style='width:{count / most:.1%}'></div>"
        for name, note, count, characters, bar in rows
    ]
    notes = [
        f"{report.documents:,} documents with {report.characters:,} characters were read.",
        f"Unicode was repaired in {report.repaired:,}; {report.loop_characters:,} characters of loops were cut from "
        f"{report.looping:,}.",
    ]
    if report.unreadable:
        notes.append(f"{report.unreadable:,} records could not be read and are listed in dropped.jsonl.")
    quantiles = report.perplexity_quantiles()
    if quantiles:
        cells = "".join(f"<th class=n>{mark} %" for mark in quantiles)
        values = "".join(f"<td class=n>{value:,.6g}" for value in quantiles.values())
        notes.append("Percentiles of perplexity, over the documents kept by the preceding rules:")
        notes.append(f"<table><tr>{cells}<tr>{values}</table>")
    head = "<tr><th>rule<th><th class=n>documents<th class=n><th class=n>characters<th>"
    return f"<table>{head}{''.join(lines)}</table>" + "".join(f"<p>{note}" for note in notes)


def report_table(report: Report) -> str:
    """The counts as text."""
    rows = [("read", report.documents, report.characters), ("kept", report.kept, report.kept_characters)]
    rows += [
        (f"dropped by {rule}", count, report.dropped_characters[rule]) for rule, count in report.dropped.most_common()
    ]
    lines = [f"{'':<48}{'documents':>12}{'characters':>16}"]
    lines += [f"{name:<48}{documents:>12}{characters:>16}" for name, documents, characters in rows]
    lines.append(f"{'Unicode repaired':<48}{report.repaired:>12}")
    lines.append(f"{'loops cut':<48}{report.looping:>12}{report.loop_characters:>16}")
    if report.unreadable:
        lines.append(f"{'unreadable':<48}{report.unreadable:>12}")
    quantiles = report.perplexity_quantiles()
    if quantiles:
        lines.append("perplexity  " + "  ".join(f"{mark} %: {value:.4g}" for mark, value in quantiles.items()))
    return "\n".join(lines)


def _describe(rules: Rules, rule: str) -> str:
    item = {item.name: item for item in dataclasses.fields(Rules)}[rule]
    limit = getattr(rules, rule)
    return item.metadata["help"] + ("" if isinstance(limit, bool) else f"; the limit is {limit:g}")


def _article(kind: str, example: Example, rules: Rules) -> str:
    drop = example.drop
    title = _text(example.where)
    if drop is not None:
        title += f" &middot; {drop.value:,.4g}"
        if drop.like is not None:
            title += " &middot; like {}, {} {}".format(*map(_text, map(str, drop.like)))
    if kind in ("loops", "max_loops"):
        body = f"<pre>{_loops(example.before, rules)}</pre>"
    elif kind == "unicode":
        body = "<div class=two>" + _changes(example.before, example.after) + "</div>"
    elif example.earlier is not None:
        body = "<div class=two>" + _changes(example.earlier, example.after) + "</div>"
    elif kind.endswith("gram") or "_line" in kind or "_paragraph" in kind:
        body = f"<pre>{_marked(example.after, repeated_spans(example.after, kind.removeprefix('max_')))}</pre>"
    else:
        body = f"<pre>{_marked(example.after, [])}</pre>"
    return f"<article><header>{title}</header>{body}</article>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _visible(text: str) -> str:
    """HTML-escaped text with visible symbols for control characters."""
    return _text("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text))


def _marked(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The beginning of a text, or the text around the first span, with the spans marked."""
    start = max(0, spans[0][0] - 200) if spans and spans[0][0] > SHOWN // 2 else 0
    end = start + SHOWN
    parts, at = ["<span class=gap>&hellip; </span>" if start else ""], start
    for begin, stop in spans:
        if begin >= end:
            break
        parts += [_visible(text[at:begin]), f"<mark>{_visible(text[begin : min(stop, end)])}</mark>"]
        at = min(stop, end)
    parts += [_visible(text[at:end]), _more(len(text) - end)]
    return "".join(parts)


def _more(characters: int) -> str:
    return f"<span class=gap> &hellip; {characters:,} characters more</span>" if characters > 0 else ""


def _loops(text: str, rules: Rules) -> str:
    """The loops of a text with some context, showing the cuts."""
    if rules.unicode:
        import ftfy

        text = ftfy.fix_text(text)
    parts, at = [], 0
    spans = find_loops(text, rules.loop_repeats, rules.loop_characters)
    for begin, end in spans[:CHANGES]:
        before = text[at:begin]
        if len(before) > 3 * CONTEXT:
            parts.append(f"<span class=gap>&hellip; </span>{_visible(before[-2 * CONTEXT :])}")
        else:
            parts.append(_visible(before))
        parts.append(f"<del>{_visible(text[begin : min(end, begin + LONGEST)])}</del>{_more(end - begin - LONGEST)}")
        at = end
    rest = text[at:]
    parts += [_visible(rest[: 2 * CONTEXT]), _more(len(rest) - 2 * CONTEXT)]
    return "".join(parts)


def _changes(before: str, after: str) -> str:
    """Two columns with the first differences between two texts, old on the left and new on the right."""
    shortest = min(len(before), len(after))
    same = next((i for i in range(shortest) if before[i] != after[i]), shortest)
    skip = max(0, same - CONTEXT)
    left, right = (_PIECE.findall(text[skip : skip + 2 * SHOWN]) for text in (before, after))
    columns: tuple[list[str], list[str]] = ([], [])
    changes = 0
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        texts = "".join(left[a:b]), "".join(right[c:d])
        if kind == "equal":
            for column, text in zip(columns, texts, strict=True):
                if len(text) > 3 * CONTEXT:
                    column += [_visible(text[:CONTEXT]), "<span class=gap> &hellip; </span>", _visible(text[-CONTEXT:])]
                else:
                    column.append(_visible(text))
            continue
        changes += 1
        if changes > CHANGES:
            break
        columns[0].append(f"<del>{_visible(texts[0])}</del>")
        columns[1].append(f"<ins>{_visible(texts[1])}</ins>")
    start = "<span class=gap>&hellip; </span>" if skip else ""
    return "".join(f"<pre>{start}{''.join(column)}<span class=gap> &hellip;</span></pre>" for column in columns)
