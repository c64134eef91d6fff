"""Write the page: figures and tables in one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron.common.atomic_files import write_text
from tools.report.figures import Picture, short_name
from tools.report.runs import LOSS, SPEED, RecordedRun, TrainingStage

STYLE = """
:root { color-scheme: light; --line: #ddd }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem } p { margin: .3rem 0; max-width: 50rem }
.scroll { overflow-x: auto } img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem }
td, th { padding: .25rem .7rem; text-align: left }
tr { border-bottom: 1px solid var(--line) } .n { text-align: right; font-variant-numeric: tabular-nums }
.note { color: #666; font-size: .9rem } code { overflow-wrap: anywhere }
"""
Row = tuple[Any, ...]


def write_page(runs: Sequence[RecordedRun], figures: Sequence[Picture], folder: Path, title: str) -> Path:
    """Write `page.html` and return its path."""
    names = ", ".join(run.name for run in runs)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1><p class=note>{_text(names)}</p>",
        _section("Stages", _stages(runs)),
    ]
    parts += [_figure(figure) for figure in figures]
    parts += [_section("Accuracy", _scores(runs)), _section("Training data", _data(runs))]
    parts += [_section("Cleaning", _cleaning(runs)), _section("Questions in the corpus", _contamination(runs))]
    parts += [_section("Provenance", _provenance(runs)), _section("Skipped", _problems(runs))]
    path = folder / "page.html"
    write_text(path, "\n".join(part for part in parts if part) + "\n</body></html>\n")
    return path


def _figure(figure: Picture) -> str:
    data = base64.b64encode(figure.path.read_bytes()).decode()
    name = figure.path.stem
    return (
        f"<section id={name}><h2>{_text(figure.title)}</h2><p class=note>{_text(figure.caption)}</p>"
        f"<img alt='{_text(figure.title)}' src='data:image/png;base64,{data}'></section>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


def _table(head: Row, rows: Sequence[Row]) -> str:
    """An HTML table; columns whose cells all begin with a number are right-aligned."""
    if not rows:
        return ""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in cells) for i in range(len(head))]
    classes = [" class=n" if flag else "" for flag in right]
    lines = ["<tr>" + "".join(f"<th{c}>{_text(name)}</th>" for c, name in zip(classes, head, strict=True)) + "</tr>"]
    for row in cells:
        lines.append("<tr>" + "".join(f"<td{c}>{_text(x)}</td>" for c, x in zip(classes, row, strict=True)) + "</tr>")
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _stages(runs: Sequence[RecordedRun]) -> str:
    head = ("run", "stage", "steps", "tokens", "first loss", "last loss", "tokens/s, median", "hours")
    return _table(head, [_stage_row(run, stage) for run in runs for stage in run.stages])


def _stage_row(run: RecordedRun, stage: TrainingStage) -> Row:
    losses = [value for _, value in stage.curve(LOSS)]
    speeds = sorted(value for _, value in stage.curve(SPEED))
    tokens = stage.tokens
    return (
        run.name,
        stage.name,
        f"{len(losses):,}",
        "-" if tokens is None else f"{tokens:,.0f}",
        f"{losses[0]:.4f}" if losses else "-",
        f"{losses[-1]:.4f}" if losses else "-",
        f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-",
        f"{(stage.ended - stage.began) / 3600:.3f}",
    )


def _scores(runs: Sequence[RecordedRun]) -> str:
    rows = []
    for run in runs:
        for score in run.scores:
            topics: list[str | None] = [None, *score.summary.get("topics", {})]
            for topic in topics:
                found = score.of(topic)
                if found is not None:
                    low, high = found["wilson_95"]
                    share = f"{100 * found['accuracy']:.1f}"
                    interval = f"{100 * low:.1f} to {100 * high:.1f}"
                    rows.append(
                        (run.name, score.name, topic or "all", f"{found['correct']}/{found['n']}", share, interval)
                    )
    return _table(("run", "model", "questions", "right", "%", "95 % (Wilson)"), rows)


def _data(runs: Sequence[RecordedRun]) -> str:
    rows = []
    for run in runs:
        for stage in run.stages:
            data = stage.starts[0].get("data") or [] if stage.starts else []
            total = sum(one["samples"] for one in data)
            for one in data:
                share = f"{100 * one['samples'] / max(1, total):.2f}"
                passes = f"{one['passes']:.3g}"
                rows.append((run.name, stage.name, short_name(one["source"]), f"{one['samples']:,}", share, passes))
    return _table(("run", "stage", "source", "samples", "% of the stage", "passes"), rows)


def _cleaning(runs: Sequence[RecordedRun]) -> str:
    rows = [
        (
            run.name,
            name,
            f"{one['documents']:,}",
            f"{one['kept']:,}",
            f"{one['repaired']:,}",
            f"{one['looping']:,}",
            f"{one['loop_characters']:,}",
            ", ".join(f"{rule} {count}" for rule, count in sorted(one["dropped"].items(), key=lambda item: -item[1])),
        )
        for run in runs
        for name, one in run.cleaning.items()
    ]
    head = ("run", "corpus", "documents", "kept", "repaired", "with loops", "characters of loops", "dropped by")
    return _table(head, rows)


def _contamination(runs: Sequence[RecordedRun]) -> str:
    rows = [
        (run.name, name, f"{one['questions']:,}", f"{one['documents']:,}", f"{one['threshold']:g}", one["contaminated"])
        for run in runs
        for name, one in run.contamination.items()
    ]
    return _table(("run", "report", "questions", "documents", "threshold", "contaminated documents"), rows)


def _provenance(runs: Sequence[RecordedRun]) -> str:
    rows = []
    for run in runs:
        for stage in run.stages:
            for start in stage.starts:
                layout = start.get("layout", {})
                rows.append(
                    (
                        run.name,
                        stage.name,
                        datetime.fromtimestamp(start["time"], UTC).strftime("%Y-%m-%d %H:%M UTC"),
                        f"{start['iteration']} of {start['train_iters']}",
                        f"TP{layout.get('tp')} PP{layout.get('pp')} DP{layout.get('dp')}",
                        f"{start['batch']} x {start['seq_length']}",
                        start.get("precision", "-"),
                        (start.get("commit") or "-")[:12],
                        start.get("from") or "from scratch",
                    )
                )
    head = ("run", "stage", "started", "at step", "layout", "batch", "precision", "commit", "from")
    return _table(head, rows)


def _problems(runs: Sequence[RecordedRun]) -> str:
    lines = [line for run in runs for line in run.problems]
    lines += [f"{stage.path}: {line}" for run in runs for stage in run.stages for line in stage.problems]
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
