"""A study's report as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def lines_of_study(report: Mapping[str, Any]) -> list[str]:
    """Lines with the test scores, their intervals, the layers chosen, and the curves."""
    lines = []
    for name, one in report["properties"].items():
        about = f"{one['fit_items']} items to fit, {one['test_items']} to test"
        if one["without_a_value"]:
            about += f", {one['without_a_value']} without a value"
        lines.append(f"{name} ({one['score']}; {about})")
        for source, facts in one["sources"].items():
            low, high = facts["interval_95"]
            choice = f"{facts['choice']} components" if source == "inputs" else f"layer {facts['choice']}"
            crossed = facts["cross_validated"][str(facts["choice"])]
            lines.append(
                f"  {source:10} {facts['test']:7.3f}  95 % {low:6.3f} to {high:6.3f}  {choice}, "
                f"cross-validated {crossed:.3f}"
            )
        for source, facts in one["trained_minus"].items():
            low, high = facts["interval_95"]
            lines.append(f"  trained minus {source}: {facts['test']:+.3f}, 95 % {low:+.3f} to {high:+.3f}")
        if "most_frequent" in one:
            lines.append(f"  always the most frequent class: {one['most_frequent']:.3f}")
        for point in one.get("labels", ()):
            scores = ", ".join(
                f"{source} {np.mean(values):.3f} +- {np.std(values):.3f}"
                for source, values in point["scores"].items()
                if values
            )
            lines.append(f"  {point['labels']:6} labels: {scores}")
        for step, facts in one.get("checkpoints", {}).items():
            low, high = facts["interval_95"]
            lines.append(f"  {step:10} {facts['test']:7.3f}  95 % {low:6.3f} to {high:6.3f}  layer {facts['choice']}")
    if "mean_r2" in report:
        means = ", ".join(f"{source} {value:.3f}" for source, value in report["mean_r2"].items())
        lines.append(f"mean R2: {means}")
    return lines
