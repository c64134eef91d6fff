"""Draw both reports with matplotlib; the file's suffix selects .png, .svg or .pdf."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tools.probe.retrieval import VIEWS

_COLORS = {"trained": "C0", "untrained": "0.55", "inputs": "C1"}


def draw_retrieval(report: Mapping[str, Any], path: Path) -> None:
    """Histograms of cosines between halves of the same and of different documents: one row per model, last layer."""
    models: Mapping[str, Any] = report["models"]
    figure, panels = _figure(len(models), len(VIEWS), 4.2, 2.3)
    edges = np.array(report["bins"])
    for row, (label, model) in enumerate(models.items()):
        layer, views = list(model["layers"].items())[-1]
        for column, view in enumerate(VIEWS):
            one, axes = views[view], panels[row][column]
            for kind, color in (("different", "0.6"), ("same", "C0")):
                counts = np.array(one[f"histogram_{kind}"], dtype=float)
                axes.stairs(counts / max(counts.sum(), 1), edges, fill=True, color=color, alpha=0.6, label=kind)
            axes.set_title(
                f"{label}, layer {layer}, {view}: recall@1 {100 * one['recall_at_1']:.1f} %, AUC {one['auc']:.3f}",
                fontsize=8,
            )
            axes.set_yticks([])
    panels[-1][0].set_xlabel("cosine similarity")
    panels[-1][1].set_xlabel("cosine similarity, mean subtracted")
    panels[0][0].legend(fontsize=7, title="halves of documents", title_fontsize=7)
    figure.savefig(path, dpi=150)


def draw_study(report: Mapping[str, Any], path: Path) -> None:
    """For each property: test scores, cross-validated scores by layer, and any curves requested."""
    properties: Mapping[str, Any] = report["properties"]
    first = next(iter(properties.values()))
    kinds = ["scores", "layers", *(name for name in ("labels", "checkpoints") if name in first)]
    figure, panels = _figure(len(properties), len(kinds), 3.2, 2.5)
    for row, (name, one) in enumerate(properties.items()):
        for axes, kind in zip(panels[row], kinds, strict=True):
            {"scores": _scores, "layers": _layers, "labels": _labels, "checkpoints": _checkpoints}[kind](axes, one)
            axes.tick_params(labelsize=7)
        panels[row][0].set_ylabel(f"{name}\n{one['score']} on {one['test_items']} items", fontsize=8)
    figure.savefig(path, dpi=150)


def _scores(axes: Any, one: Mapping[str, Any]) -> None:
    for place, (name, source) in enumerate(one["sources"].items()):
        low, high = source["interval_95"]
        errors = [[max(0, source["test"] - low)], [max(0, high - source["test"])]]
        axes.bar(place, source["test"], 0.6, yerr=errors, capsize=3, color=_COLORS[name])
    axes.set_xticks(range(len(one["sources"])), list(one["sources"]))
    if "most_frequent" in one:
        axes.axhline(one["most_frequent"], ls=":", color="0.3", lw=0.8)


def _layers(axes: Any, one: Mapping[str, Any]) -> None:
    for name, source in one["sources"].items():
        scores = source["cross_validated"]
        places = [int(choice) for choice in scores]
        if name == "inputs":
            axes.axhline(max(scores.values()), ls="--", color=_COLORS[name], lw=1)
            continue
        axes.plot(places, list(scores.values()), ".-", color=_COLORS[name], lw=1)
        axes.plot(source["choice"], scores[str(source["choice"])], "*", color=_COLORS[name], ms=9)
    axes.set_title("cross-validated, by layer", fontsize=8)


def _labels(axes: Any, one: Mapping[str, Any]) -> None:
    for name in one["sources"]:
        points = [(p["labels"], p["scores"][name]) for p in one["labels"] if p["scores"][name]]
        means = [float(np.mean(scores)) for _, scores in points]
        spread = [float(np.std(scores)) for _, scores in points]
        axes.errorbar([n for n, _ in points], means, spread, fmt=".-", color=_COLORS[name], lw=1, capsize=2)
    axes.set(xscale="log")
    axes.set_title("test score, by number of labels", fontsize=8)


def _checkpoints(axes: Any, one: Mapping[str, Any]) -> None:
    names, sources = list(one["checkpoints"]), list(one["checkpoints"].values())
    errors = [
        [max(0, source["test"] - source["interval_95"][0]) for source in sources],
        [max(0, source["interval_95"][1] - source["test"]) for source in sources],
    ]
    axes.errorbar(range(len(names)), [s["test"] for s in sources], errors, fmt=".-", color="C0", lw=1, capsize=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_title("test score, by checkpoint", fontsize=8)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
