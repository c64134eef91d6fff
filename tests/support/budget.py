"""Prints minutes per test folder next to the budget in tests/budget.yml: `python -m tests.support.budget XML...`

Reads pytest's JUnit reports and ignores missing ones. Exceeded budgets are marked in the table, but never fail.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import yaml

BUDGET = Path(__file__).resolve().parents[1] / "budget.yml"


@dataclass(frozen=True)
class FolderTime:
    """Number of tests in a folder, and their minutes in all phases, summed even if they ran in parallel."""

    tests: int
    minutes: float


def read_reports(reports: Iterable[Path]) -> dict[str, FolderTime]:
    """Times by folder below tests/, sorted."""
    tests: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            folder = case.get("classname", "").split(".")[1]  # tests.ops.test_emulated
            tests[folder] += 1
            seconds[folder] += float(case.get("time", 0))
    return {folder: FolderTime(tests[folder], seconds[folder] / 60) for folder in sorted(tests)}


def table(found: Mapping[str, FolderTime], budget: Mapping[str, float]) -> list[str]:
    """Lines of text; folders without a budget, and those above it, are marked."""
    lines = [f"{'folder':18} {'tests':>6} {'minutes':>8} {'budget':>7}"]
    for folder, time in found.items():
        allowed = budget.get(folder)
        mark = "no budget" if allowed is None else "OVER" if time.minutes > allowed else ""
        limit = "" if allowed is None else f"{allowed:.1f}"
        lines.append(f"{folder:18} {time.tests:6} {time.minutes:8.1f} {limit:>7} {mark}".rstrip())
    whole = sum(time.minutes for time in found.values())
    lines.append(f"{'all':18} {sum(time.tests for time in found.values()):6} {whole:8.1f} {sum(budget.values()):7.1f}")
    return lines


def main(reports: list[str]) -> int:
    budget = yaml.safe_load(BUDGET.read_text())
    print("\n".join(table(read_reports(path for path in map(Path, reports) if path.exists()), budget)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
