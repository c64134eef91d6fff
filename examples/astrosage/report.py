"""What a run of the example has shown, from the files that its steps left: report.md and loss.png."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import zstandard

from examples.demo import plot
from megatron.data.build import build_datasets
from megatron.data.header import read_header
from megatron.neox_arguments import NeoXArgs

ROOT = Path(__file__).resolve().parents[2]
PARITY = 1e-5
LOSSES = {
    "astronomy_valid_text_document": "astronomy",
    "general_valid_text_document": "general",
    "sft_valid_astronomy_document": "answers about astronomy",
}


def write_report(out: Path, runs: dict[str, list[str]]) -> str:
    """`runs` has the YAML files of `cpt` and `sft`. Raises SystemExit where `transformers` does not agree."""
    sections = [
        ("What was dropped and repaired", cleaning(out)),
        ("What was mixed", mixture(runs)),
        ("What was masked", masks(out)),
        ("What was learned", losses(out)),
    ]
    for stage in ("cpt", "sft"):
        records = [json.loads(line) for line in (out / f"logs/{stage}/metrics.jsonl").read_text().splitlines()]
        plot(records, out / f"loss_{stage}.png")
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections)
    (out / "report.md").write_text(f"# A small AstroSage\n\n{text}\n")
    return text


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table, columns aligned so that it can be read as it is."""
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def cleaning(out: Path) -> str:
    """For each kind of damage: how many documents had it, and what became of them."""
    raw = zstandard.decompress((out / "raw/astronomy.jsonl.zst").read_bytes(), max_output_size=1 << 30).splitlines()
    damage = [json.loads(line)["damage"] or "none" for line in raw]
    dropped = [json.loads(line) for line in (out / "clean/astronomy_report/dropped.jsonl").read_text().splitlines()]
    rules: dict[str, Counter[str]] = {}
    for entry in dropped:
        rules.setdefault(damage[entry["line"] - 1], Counter())[entry["rule"]] += 1
    rows = []
    for kind, count in sorted(Counter(damage).items()):
        found = rules.get(kind, Counter())
        rows.append((kind, count, count - found.total(), ", ".join(f"{r} {n}" for r, n in found.most_common(4))))
    summary = json.loads((out / "clean/astronomy_report/summary.json").read_text())
    return (
        table(("damage", "documents", "kept", "dropped by"), rows)
        + f"\n\n{summary['repaired']} documents had their Unicode repaired; {summary['loop_characters']} characters of "
        f"loops were cut out of {summary['looping']} documents.\nSee clean/astronomy_report/page.html."
    )


def mixture(runs: dict[str, list[str]]) -> str:
    """The realised shares, from the indices that the trainings read."""
    parts = []
    for name, ymls in runs.items():
        notes = build_datasets(NeoXArgs.from_ymls([str(ROOT / yml) for yml in ymls])).notes
        lines = [note.removeprefix("train: ").replace(f"{ROOT}/", "") for note in notes if note.startswith("train: ")]
        parts.append(f"{name}:\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def masks(out: Path) -> str:
    rows = []
    for name in ("reasoning", "astronomy", "general"):
        header = read_header(out / f"data/sft_{name}_document")
        assert header is not None
        assert header.chat is not None
        learned = header.chat.learned_tokens
        rows.append((name, header.tokens, learned, f"{learned / header.tokens:.1%}"))
    return table(("source", "tokens", "learned", "share"), rows)


def losses(out: Path) -> str:
    theirs = json.loads((out / "check.json").read_text())
    ours: dict[str, dict[str, float]] = {}
    for path in sorted((out / "logs").glob("*_eval_results.json")):
        stage = re.sub(r"_.*", "", path.name)
        results = json.loads(path.read_text())["results"]
        ours.setdefault(stage, {}).update({name: result["loss"] for name, result in results.items()})
    worst, rows = 0.0, []
    for name, shown in LOSSES.items():
        for stage in ("base", "cpt", "sft"):
            worst = max(worst, abs(ours[stage][name] - theirs[stage]["loss"][name]))
        rows.append((shown, *(f"{ours[stage][name]:.4f}" for stage in ("base", "cpt", "sft"))))
    if not worst < PARITY or not math.isfinite(worst):
        raise SystemExit(f"eval.py and transformers differ by {worst:.1e}, more than {PARITY:.0e}")
    said = "\n".join(f"- {stage}: {theirs[stage]['answer']!r}" for stage in ("base", "cpt", "sft"))
    return (
        table(("validation loss", "base", "after pre-training", "after fine-tuning"), rows)
        + f"\n\nLargest difference to transformers' loss, on the exported models: {worst:.1e}.\n"
        f'Asked "What is SkyCoord for?":\n\n{said}'
    )
