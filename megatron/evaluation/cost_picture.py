"""Plots accuracy against cost, as in the AstroSage-70B paper.

    python -m megatron.evaluation.cost_picture TABLE PICTURE

TABLE is a CSV with a row per model: `model`; `cost` in USD per 0.1M tokens; `accuracy` in percent and `n`, or `correct`
and `n`; optionally `base`, the model it was trained from, where its arrow starts. Instead of cost and accuracy, a row
can name the `summary` that mcq.py wrote and the `price_per_hour` of the machine in USD: the cost is then computed from
the measured tokens and seconds.

Dashed lines are accuracy = a + 3.5 log10(cost): within a family of models, ten times the price has bought about 3.5
points. Each line is a tenfold gain in cost efficiency over the next lower one. The slope is a fit to strong models of
similar accuracy, so gains are stated up to a distance of three lines (a factor of 1,000 either way, 10.5 points at
equal cost); anything further apart is reported as beyond the fit.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError
from megatron.common.picture_files import ENDINGS
from megatron.evaluation.multiple_choice.statistics import wilson_interval

POINTS_PER_TENFOLD = 3.5
MOST_TENFOLDS = 3  # largest distance, in lines, that is stated as a gain
TOKENS = 100_000  # number of tokens that the cost is for
OURS: dict[str, Any] = {"marker": "*", "color": "C3", "ms": 10}
OTHERS: dict[str, Any] = {"marker": "o", "color": "C0", "ms": 5}


@dataclass(frozen=True)
class PricedScore:
    """A model's point in the plot: cost in USD per 0.1M tokens, accuracy in percent of `n` items."""

    model: str
    cost: float
    accuracy: float
    n: int
    base: str | None

    @property
    def efficiency(self) -> float:
        """Accuracy extrapolated along the dashed lines to a cost of 1."""
        return self.accuracy - POINTS_PER_TENFOLD * math.log10(self.cost)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval, in percent."""
        low, high = wilson_interval(round(self.accuracy / 100 * self.n), self.n)
        return 100 * low, 100 * high


def efficiency_gain(ours: PricedScore, base: PricedScore) -> float | None:
    """The cost that the base's family would need for the accuracy of `ours`, relative to the cost of `ours`.

    None if the two are more than MOST_TENFOLDS lines apart: the fit does not extend that far.
    """
    tenfolds = (ours.efficiency - base.efficiency) / POINTS_PER_TENFOLD
    return None if abs(tenfolds) > MOST_TENFOLDS + 1e-9 else 10**tenfolds


def read_table(path: Path) -> list[PricedScore]:
    """Read the rows of a CSV. Raises UserError for incomplete or impossible rows."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = (line for line in file if not line.startswith("#"))
            rows = [_score(path, number, row) for number, row in enumerate(csv.DictReader(lines), start=1)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    names = [row.model for row in rows]
    for row in rows:
        if names.count(row.model) > 1:
            raise UserError(f"{path}: {row.model} has two rows")
        if row.base is not None and row.base not in names:
            raise UserError(f"{path}: {row.model} is made from {row.base}, which has no row")
    return rows


def _score(path: Path, number: int, row: dict[str, str]) -> PricedScore:
    where = f"{path}, row {number}"
    try:
        if row.get("summary"):
            cost, accuracy, n = _measured(path.parent / row["summary"], float(row["price_per_hour"]))
        else:
            cost, n = float(row["cost"]), int(row["n"])
            accuracy = 100 * int(row["correct"]) / n if row.get("correct") else float(row["accuracy"])
        model = row["model"]
    except KeyError as error:
        raise UserError(f"{where}: there is no {error}; a row has model, cost, n, and accuracy or correct") from None
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: {error}") from None
    if not (cost > 0 and math.isfinite(cost) and 0 <= accuracy <= 100 and n > 0):
        raise UserError(
            f"{where}: expected cost and n above 0, accuracy 0 to 100; given {cost:g}, {n} and {accuracy:g}"
        )
    return PricedScore(model, cost, accuracy, n, row.get("base") or None)


def _measured(summary: Path, price_per_hour: float) -> tuple[float, float, int]:
    content: dict[str, Any] = json.loads(summary.read_text())
    if "accuracy" not in content:
        raise ValueError(f"{summary} has no accuracy: its answers were withheld")
    hours = content["seconds"] / 3600
    return price_per_hour * hours / content["tokens"] * TOKENS, 100 * content["accuracy"], content["n"]


def draw_costs(scores: Sequence[PricedScore], path: Path, *, cost_label: str, title: str | None = None) -> None:
    """Write the figure; its extension (.png, .svg, .pdf) determines the format."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cost", "font.size": 9}):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.subplots()
        low, high = min(s.cost for s in scores) / 4, max(s.cost for s in scores) * 4
        bottom, top = min(s.interval[0] for s in scores) - 3, max(s.interval[1] for s in scores) + 3
        axes.set(xscale="log", xlim=(low, high), ylim=(bottom, top), xlabel=cost_label, ylabel="accuracy (%)")
        _efficiency_lines(axes, (low, high), (bottom, top), max(s.efficiency for s in scores))
        by_name = {score.model: score for score in scores}
        for score in scores:
            ours = score.base is not None
            axes.plot(score.cost, score.accuracy, **(OURS if ours else OTHERS))
            axes.annotate(score.model, (score.cost, score.accuracy), (6, 4), textcoords="offset points", fontsize=8)
            if score.base is not None:
                base = by_name[score.base]
                axes.annotate(
                    "",
                    xy=(score.cost, score.accuracy),
                    xytext=(base.cost, base.accuracy),
                    arrowprops={"arrowstyle": "->", "color": "C3", "shrinkA": 4, "shrinkB": 6},
                )
        _interval_bar(axes, scores)
        if title:
            axes.set_title(title, fontsize=9)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _efficiency_lines(axes: Any, costs: tuple[float, float], accuracies: tuple[float, float], through: float) -> None:
    """Lines of equal efficiency, a tenfold gain apart, one of them through the best point."""
    ends = [POINTS_PER_TENFOLD * math.log10(cost) for cost in costs]
    lowest, highest = accuracies[0] - ends[1], accuracies[1] - ends[0]
    first = through - POINTS_PER_TENFOLD * math.floor((through - lowest) / POINTS_PER_TENFOLD)
    while first < highest:
        axes.plot(costs, [first + end for end in ends], "--", color="0.75", lw=0.8, zorder=0)
        first += POINTS_PER_TENFOLD


def _interval_bar(axes: Any, scores: Sequence[PricedScore]) -> None:
    """One error bar for the whole plot, at its edge: the interval of the best model."""
    best = max(scores, key=lambda score: score.accuracy)
    low, high = best.interval
    x = axes.get_xlim()[1] / 1.5
    axes.errorbar(x, best.accuracy, [[best.accuracy - low], [high - best.accuracy]], color="0.4", capsize=3, fmt="none")
    axes.annotate("95 %\nWilson", (x, low), (0, -4), textcoords="offset points", fontsize=7, ha="center", va="top")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron.evaluation.cost_picture", description="Accuracy against cost, from a CSV."
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("picture", type=Path, help="where to write it: .png, .svg or .pdf")
    parser.add_argument("--cost-label", default="cost (USD per 0.1M tokens)", help="label of the cost axis")
    parser.add_argument("--title", help="title of the figure, which should state the source of the numbers")
    given = parser.parse_args(arguments)
    try:
        if given.picture.suffix not in ENDINGS:
            raise UserError(f"{given.picture}: expected a name that ends in .png, .svg or .pdf")
        scores = read_table(given.table)
        draw_costs(scores, given.picture, cost_label=given.cost_label, title=given.title)
    except ImportError:
        print("cost_picture: matplotlib is missing; pip install .[eval]", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"cost_picture: {error}", file=sys.stderr)
        return 2
    by_name = {score.model: score for score in scores}
    for score in scores:
        low, high = score.interval
        print(f"{score.model}: {score.accuracy:.1f} % (95 % {low:.1f} to {high:.1f}) at {score.cost:.3g}")
        if score.base is not None:
            base = by_name[score.base]
            points, gain = score.accuracy - base.accuracy, efficiency_gain(score, base)
            told = f"more than {MOST_TENFOLDS} lines apart, beyond the fit"
            if gain is not None:
                told = f"{gain:.3g} times its cost efficiency"
            print(f"  {points:+.1f} points over {base.model}: {told}")
    print(f"written to {given.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
