"""The results of the example: a table, a picture, and two claims that must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("base", "lora", "full")
NAMES = {"base": "base", "lora": "LoRA", "full": "all weights"}
SOURCES = ("domain", "general")
RESAMPLES = 10_000
MOST_FORGOTTEN = 1.05  # of the base's loss on general text
SIGNIFICANCE = 0.01


def document_losses(folder: Path) -> dict[str, dict[int, tuple[float, int]]]:
    """(loss per token, tokens) of every document, by source and number."""
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for line in (folder / "documents.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["source"], {})[record["document"]] = (record["loss"], record["tokens"])
    return found


def token_loss(documents: Mapping[int, tuple[float, int]]) -> float:
    return sum(loss * tokens for loss, tokens in documents.values()) / sum(tokens for _, tokens in documents.values())


def bootstrap(before: Mapping[int, tuple[float, int]], after: Mapping[int, tuple[float, int]]) -> float:
    """One-sided p: the fraction of n resampled sets of documents on which the loss did not fall, at least 1 / n."""
    numbers = sorted(before)
    tokens = np.array([before[number][1] for number in numbers], dtype=np.float64)
    gain = np.array([before[number][0] - after[number][0] for number in numbers]) * tokens
    drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    return max(float(np.mean(gain[drawn].sum(axis=1) <= 0)), 1 / RESAMPLES)


def write_report(out: Path) -> str:
    """Write `report.md`, `report.json` and `report.png` into `out`; returns the text. SystemExit if a claim fails."""
    losses = {name: document_losses(out / f"eval_{name}") for name in MODELS}
    rows: dict[str, dict[str, float]] = {
        f"{source} text, loss per token": {name: token_loss(losses[name][source]) for name in MODELS}
        for source in SOURCES
    }
    rows["multiple choice, accuracy"] = {name: _accuracy(out / f"mcq_{name}") for name in MODELS}
    rows |= _retrieval(json.loads((out / "retrieval.json").read_text()))
    p = {name: bootstrap(losses["base"]["domain"], losses[name]["domain"]) for name in MODELS[1:]}
    general = rows["general text, loss per token"]
    forgotten = {name: general[name] / general["base"] for name in MODELS[1:]}
    sizes = {name: _bytes(out / name) for name in MODELS[1:]}
    lines = ["# AstroLLaMA, scaled down\n", f"| | {' | '.join(NAMES[name] for name in MODELS)} |", "|---|---|---|---|"]
    lines += [f"| {what} | {' | '.join(f'{row[name]:.3f}' for name in MODELS)} |" for what, row in rows.items()]
    lines += [f"| checkpoint, MB | | {' | '.join(f'{sizes[name] / 1e6:.2f}' for name in MODELS[1:])} |", ""]
    for name in MODELS[1:]:
        lines.append(
            f"{NAMES[name]}: better on the domain with p = {p[name]:.4f} (bootstrap over documents), general loss "
            f"{forgotten[name] - 1:+.1%}."
        )
    text = "\n".join(lines) + "\n"
    (out / "report.md").write_text(text)
    facts = {"rows": rows, "p": p, "forgotten": forgotten, "checkpoint_bytes": sizes}
    (out / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    _draw(out, rows)
    if p["lora"] >= SIGNIFICANCE or forgotten["lora"] > MOST_FORGOTTEN:
        raise SystemExit(text + "the adapter has not learned the domain, or has forgotten the rest")
    return text


def _accuracy(folder: Path) -> float:
    summary = json.loads((folder / "summary.json").read_text())
    found: float = summary["accuracy"]
    return found


def _retrieval(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Retrieval scores of the last layer's vectors, with their mean subtracted."""
    views = {name: next(iter(found["models"][name]["layers"].values()))["centered"] for name in MODELS}
    return {
        "halves of a document, recall@1": {name: view["recall_at_1"] for name, view in views.items()},
        "halves of a document, AUC": {name: view["auc"] for name, view in views.items()},
    }


def _bytes(folder: Path) -> int:
    """Size of the latest checkpoint."""
    tag = (folder / "latest").read_text().strip()
    return sum(path.stat().st_size for path in (folder / tag).rglob("*") if path.is_file())


def _draw(out: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in MODELS[1:]:
        lines = (out / "logs" / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for source, style in zip(SOURCES, ("-", "--"), strict=True):
            key = f"validation/{source}_valid_text_document/lm_loss"
            points = [(record["iteration"], record[key]) for record in records if key in record]
            color = {"lora": "C0", "full": "C1"}[name]
            left.plot(*zip(*points, strict=True), style, color=color, label=f"{source}, {NAMES[name]}")
    left.set(xlabel="step", ylabel="validation loss, nats per token", title="domain and general text")
    left.legend(fontsize=8)
    shares = {what: row for what, row in rows.items() if not what.endswith("loss per token")}
    for place, row in enumerate(shares.values()):
        for shift, name in enumerate(MODELS):
            right.bar(place + (shift - 1) * 0.25, row[name], 0.25, color=("0.6", "C0", "C1")[shift], label=NAMES[name])
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[:3], labels[:3], fontsize=8)
    right.set_xticks(range(len(shares)), [what.replace(", ", ",\n") for what in shares], fontsize=8)
    right.set(ylim=(0, 1), ylabel="share", title="questions, and halves of documents")
    figure.savefig(out / "report.png", dpi=120)
