"""Draw the figures of the page as PNGs: those of the AstroSage-70B paper, and curves for operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron.evaluation.cost_picture import PricedScore, draw_costs
from tools.report.runs import LOSS, NORM, RATE, SPEED, Curve, RecordedRun, TrainingStage

# Okabe and Ito's palette, whose colors can be distinguished with any kind of color vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
DPI = 120
SMOOTHED = 25  # steps over which the loss is averaged in long runs
TOKENS = 100_000  # number of tokens whose cost is shown


@dataclass(frozen=True)
class Picture:
    """A PNG, its heading, and its caption."""

    path: Path
    title: str
    caption: str


def draw_all(
    runs: Sequence[RecordedRun], folder: Path, *, topic: str | None = None, price_per_hour: float | None = None
) -> list[Picture]:
    """Draw every figure for which the runs have data."""
    found: list[Picture | None] = [
        dynamics(runs, folder / "figure1_dynamics.png"),
        composition(runs, folder / "figure2_composition.png"),
        cost(runs, folder / "figure3_cost.png", topic, price_per_hour),
        topic_bars(runs, folder / "accuracy.png"),
        validation(runs, folder / "validation.png"),
        _one(runs, folder / "gradient_norm.png", NORM, "Gradient norm", "gradient norm before clipping"),
        _one(runs, folder / "throughput.png", SPEED, "Throughput", "tokens per second, all ranks"),
        cleaning(runs, folder / "cleaning.png"),
    ]
    return [picture for picture in found if picture is not None]


# --- figure 1


def dynamics(runs: Sequence[RecordedRun], path: Path) -> Picture | None:
    """Loss (top) and learning rate (bottom) over all stages in sequence."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        for stage, offset in zip(run.stages, run.offsets(), strict=True):
            loss = stage.curve(LOSS)
            if len(loss) > 4 * SMOOTHED:
                losses.plot(*_moved(loss, offset), color=color, linewidth=0.5, alpha=0.25)
                loss = smoothed(loss)
            losses.plot(*_moved(loss, offset), color=color, linewidth=1.2, label=_label(runs, run, stage))
            rates.plot(*_moved(stage.curve(RATE), offset), color=color, linewidth=1.2)
            _mark_adjustments(losses, rates, stage, offset)
        if number == 0:
            _mark_stages((losses, rates), run)
    losses.set(ylabel="training loss, nats per token")
    rates.set(xlabel="optimizer step, stages in sequence", ylabel="learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if len(runs) > 1:
        handles, labels = losses.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        losses.legend(shown.values(), shown.keys(), fontsize=8)
    adjusted = sum(len(stage.overrides) for run in runs for stage in run.stages)
    caption = (
        f"Loss (averaged over {SMOOTHED} steps in long runs; pale: each step) and learning rate. Dotted lines mark "
        f"the start of a stage, dashed lines manual adjustments of the learning rate ({adjusted} here)."
    )
    return _saved(figure, path, "Training dynamics (Figure 1)", caption)


def smoothed(curve: Curve) -> Curve:
    """Mean of the last SMOOTHED steps, at each step."""
    total, found = 0.0, []
    for number, (step, value) in enumerate(curve):
        total += value - (curve[number - SMOOTHED][1] if number >= SMOOTHED else 0.0)
        found.append((step, total / min(number + 1, SMOOTHED)))
    return found


def _mark_stages(axes: Sequence[Any], run: RecordedRun) -> None:
    if len(run.stages) < 2:
        return
    for stage, offset in zip(run.stages, run.offsets(), strict=True):
        begin = offset + max(0, stage.first - 1)
        for part in axes:
            part.axvline(begin, color="0.4", linestyle=":", linewidth=1)
        axes[0].annotate(
            stage.name, (begin, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="top", fontsize=9, color="0.3",
        )  # fmt: skip


def _mark_adjustments(losses: Any, rates: Any, stage: TrainingStage, offset: int) -> None:
    for at, scale in stage.overrides:
        for part in (losses, rates):
            part.axvline(offset + at, color="#cc79a7", linestyle="--", linewidth=1)
        rates.annotate(
            f"x {scale:g}", (offset + at, 1), (3, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", fontsize=8, color="#cc79a7",
        )  # fmt: skip


# --- figure 2


def composition(runs: Sequence[RecordedRun], path: Path) -> Picture | None:
    """Share of each source in every stage's samples."""
    bars = [
        (_label(runs, run, stage), [(short_name(one["source"]), one["samples"]) for one in stage.starts[0]["data"]])
        for run in runs
        for stage in run.stages
        if stage.starts and stage.starts[0].get("data")
    ]
    if not bars:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.7 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for row, (_, parts) in enumerate(bars):
        left, total = 0.0, sum(samples for _, samples in parts)
        for number, (name, samples) in enumerate(parts):
            width = 100 * samples / max(1, total)
            color = COLORS[number % len(COLORS)]
            axes.barh(row, width, left=left, color=color, edgecolor="white")
            if width > 4:
                text = f"{name}\n{width:.1f} %"
                axes.text(left + width / 2, row, text, ha="center", va="center", fontsize=8, color="white")
            left += width
    axes.set(yticks=range(len(bars)), yticklabels=[name for name, _ in bars], xlim=(0, 100), xlabel="% of the samples")
    axes.invert_yaxis()
    caption = "Training data of each stage: the actual share of every source, from the order of the samples."
    return _saved(figure, path, "Composition of the training data (Figure 2)", caption)


def short_name(prefix: str) -> str:
    """The name of a data source without the suffix added by preprocessing."""
    name = Path(prefix).name
    for ending in ("_text_document", "_document"):
        name = name.removesuffix(ending)
    return name


# --- figure 3, and accuracy by topic


def cost(runs: Sequence[RecordedRun], path: Path, topic: str | None, price_per_hour: float | None) -> Picture | None:
    """Accuracy against the cost of 0.1M tokens, as measured by mcq.py."""
    scores = []
    for run in runs:
        for score in run.scores:
            found, summary = score.of(topic), score.summary
            if found is None or not summary.get("tokens") or not summary.get("seconds"):
                continue
            hours = summary["seconds"] / 3600 / summary["tokens"] * TOKENS
            name = score.name if len(runs) == 1 else f"{run.name} {score.name}"
            scores.append(PricedScore(name, hours * (price_per_hour or 1.0), 100 * found["accuracy"], found["n"], None))
    if not scores:
        return None
    label = "machine-hours per 0.1M tokens" if price_per_hour is None else "cost (USD per 0.1M tokens)"
    draw_costs(scores, path, cost_label=label, title=f"accuracy of {topic or 'all questions'}")
    caption = (
        "Accuracy against the cost of answering, from the tokens and seconds that mcq.py measured. Dashed lines: 3.5 "
        "points per tenfold increase of cost, the paper's convention. Models of the same size cost the same, apart "
        "from other load on the machine."
    )
    return Picture(path, "Accuracy against cost (Figure 3)", caption)


def topic_bars(runs: Sequence[RecordedRun], path: Path) -> Picture | None:
    """Accuracy of every test by topic, with Wilson intervals."""
    scores = [(run, score) for run in runs for score in run.scores]
    if not scores:
        return None
    topics: list[str | None] = [topic for _, score in scores[:1] for topic in score.summary.get("topics", {})] or [None]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(scores)
    for number, (run, score) in enumerate(scores):
        name = score.name if len(runs) == 1 else f"{run.name} {score.name}"
        places, heights, below, above = [], [], [], []
        for place, topic in enumerate(topics):
            found = score.of(topic)
            if found is not None:
                low, high = (100 * edge for edge in found["wilson_95"])
                value = 100 * found["accuracy"]
                places.append(place + (number - (len(scores) - 1) / 2) * width)
                heights.append(value)
                below.append(value - low)
                above.append(high - value)
        axes.bar(
            places, heights, width, yerr=[below, above], label=name, color=COLORS[number % len(COLORS)],
            error_kw={"elinewidth": 0.8, "ecolor": "0.2"},
        )  # fmt: skip
    axes.set(ylabel="accuracy, %", ylim=(0, 105), xticks=range(len(topics)))
    axes.set_xticklabels([topic or "all questions" for topic in topics])
    axes.legend(fontsize=8, ncols=min(4, len(scores)), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return _saved(figure, path, "Multiple choice after each stage", "Error bars are 95 % Wilson intervals.")


# --- curves for operators


def validation(runs: Sequence[RecordedRun], path: Path) -> Picture | None:
    """Validation loss of each source over all stages."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    names = sorted({source for run in runs for stage in run.stages for source in stage.validation})
    if not names:
        return None
    for number, run in enumerate(runs):
        for stage, offset in zip(run.stages, run.offsets(), strict=True):
            for source, curve in stage.validation.items():
                label = short_name(source) if len(runs) == 1 else f"{run.name} {short_name(source)}"
                axes.plot(
                    *_moved(curve, offset), marker="o", markersize=3, linestyle=("-", "--", ":")[number % 3],
                    color=COLORS[names.index(source) % len(COLORS)], label=label,
                )  # fmt: skip
    axes.set(xlabel="optimizer step, stages in sequence", ylabel="loss, nats per token")
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    axes.legend(shown.values(), shown.keys(), fontsize=8)
    return _saved(figure, path, "Validation of each source", "How well the domain is learned and the rest retained.")


def _one(runs: Sequence[RecordedRun], path: Path, name: str, title: str, label: str) -> Picture | None:
    """One value over all steps; the axis is logarithmic if the values span more than two decades."""
    if not any(stage.curve(name) for run in runs for stage in run.stages):
        return None
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    values: list[float] = []
    for number, run in enumerate(runs):
        for stage, offset in zip(run.stages, run.offsets(), strict=True):
            curve = stage.curve(name)
            values += [value for _, value in curve if value > 0]
            axes.plot(*_moved(curve, offset), color=COLORS[number % len(COLORS)], linewidth=0.8, label=run.name)
        if number == 0:
            _mark_stages((axes,), run)
    if values and math.log10(max(values) / min(values)) > 2:
        axes.set_yscale("log")
    axes.set(xlabel="optimizer step, stages in sequence", ylabel=label)
    if len(runs) > 1:
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        axes.legend(shown.values(), shown.keys(), fontsize=8)
    return _saved(figure, path, title, "")


def cleaning(runs: Sequence[RecordedRun], path: Path) -> Picture | None:
    """Documents dropped by each cleaning rule."""
    rows = [
        (f"{name}: {rule}", count, 100 * count / max(1, summary["documents"]))
        for run in runs
        for name, summary in run.cleaning.items()
        for rule, count in sorted(summary["dropped"].items(), key=lambda item: -item[1])
    ]
    if not rows:
        return None
    figure = Figure(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _, _ in rows], [count for _, count, _ in rows], color=COLORS[0])
    for number, (_, count, share) in enumerate(rows):
        axes.text(count, number, f" {count} ({share:.1f} %)", va="center", fontsize=8)
    axes.set(xlabel="documents dropped")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    return _saved(figure, path, "What cleaning removed", "Documents by the rule that dropped them.")


# --- common


def _moved(curve: Curve, offset: int) -> tuple[list[int], list[float]]:
    return [step + offset for step, _ in curve], [value for _, value in curve]


def _label(runs: Sequence[RecordedRun], run: RecordedRun, stage: TrainingStage) -> str:
    return stage.name if len(runs) == 1 else f"{run.name} {stage.name}"


def _saved(figure: Figure, path: Path, title: str, caption: str) -> Picture:
    with matplotlib.rc_context({"font.size": 9}):
        figure.savefig(path, dpi=DPI)
    return Picture(path, title, caption)
