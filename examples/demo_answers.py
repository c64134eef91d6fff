"""What the demo's training taught: questions answered correctly before and after, with significance tests.

Reads `questions.jsonl` of demo_facts.py and mcq.py's `items.jsonl` of both checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

from examples.astrosage.results import against_control_p, verdicts_of
from megatron.evaluation.multiple_choice.statistics import compare_paired

TOLD, UNTOLD = "told", "in no text"
OPTIONS = 4


def p_values(before: dict[str, list[bool]], after: dict[str, list[bool]]) -> dict[str, float]:
    """Exact p of told facts: after against before (McNemar), and against facts in no text, after (Fisher, greater)."""
    return {
        "against_before": compare_paired(before[TOLD], after[TOLD]).p_value,
        "against_control": against_control_p(after[TOLD], after[UNTOLD]),
    }


def report(out: Path, written: dict[str, dict[str, str]]) -> list[str]:
    """Lines for the end of the demo in `out`; `written` are the model's answers before and after training."""
    before, after = (verdicts_of(out / "mcq" / when / "items.jsonl") for when in ("before", "after"))
    items = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    right = {item["question"]: item[item["answer"]] for item in items}
    lines = []
    for topic in (TOLD, UNTOLD):
        n = len(after[topic])
        lines.append(
            f"{topic:<11} before {sum(before[topic]):3} of {n} right   after {sum(after[topic]):3} of {n} right   "
            f"chance {n / OPTIONS:.0f} of {n}"
        )
    found = p_values(before, after)
    lines.append(
        f"exact p            told, after against before {found['against_before']:.1e} (McNemar); "
        f"told against in no text {found['against_control']:.1e} (Fisher)"
    )
    for question, answer in written["after"].items():
        lines.append(f"{question} {right[question]}. Before: {written['before'][question]!r}, after: {answer!r}")
    return lines
