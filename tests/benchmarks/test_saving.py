"""benchmarks/saving.py runs all three methods and leaves its folder empty; times are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.saving import Way, cost_of

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]


def test_every_way_is_measured(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    command = [sys.executable, "benchmarks/saving.py", "--folder", str(folder), "--json", str(tmp_path / "r.json")]
    command += ["--hidden", "128", "--layers", "2", "--vocab", "512", "--seq", "64", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "r.json").read_text())
    assert set(facts["seconds"]) == {"sync", "async_save", "torch async"}
    for cost in facts["seconds"].values():
        assert all(len(cost[name]) == 2 for name in ("blocked", "slowed", "lost", "written"))
        assert all(b <= w for b, w in zip(cost["blocked"], cost["written"], strict=True))
    assert "sync / async blocked" in facts["ratios"]
    assert not list(folder.iterdir())


class _Written(Way):
    """A save that completes after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def save(self) -> None:
        pass

    def over(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_slowed_is_the_excess_time_of_steps_during_a_write() -> None:
    steps = iter([2.0, 1.5, 3.0, 99.0])
    _, slowed, _ = cost_of(_Written(3), lambda: next(steps), usual=1.0)
    assert slowed == 3.5
    _, slowed, _ = cost_of(_Written(0), lambda: next(steps), usual=1.0)
    assert slowed == 0.0, "no step is taken while a save that blocks is written"
    assert next(steps) == 99.0
