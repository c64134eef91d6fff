"""examples/merging.py from text to its table, with too few steps to learn anything."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from tests.support.documentation import run_in_root


@pytest.mark.slow
def test_the_table(tmp_path: Path) -> None:
    done = run_in_root([sys.executable, "examples/merging.py", "--output", str(tmp_path / "out"), "--steps", "3"])
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads((tmp_path / "out/losses.json").read_text())
    assert [*losses][:4] == ["base", "cpt", "sft", "instruct"]
    assert len(losses) == 11
    for name, row in losses.items():
        assert f"| {name} | " in done.stdout
        assert all(math.isfinite(loss) for loss in row.values())
    # Masks at density 0.5 change the model, and so does the instruct model's own base.
    assert len({tuple(row.values()) for row in losses.values()}) == 11
