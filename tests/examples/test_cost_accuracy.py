"""The small run behind a cost-accuracy picture, shortened: two trainings, two tests, one arrow."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_picture_is_of_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "examples/cost_accuracy.py", "--output", str(tmp_path / "out"), "--iters", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "out/cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["base"] for row in rows] == ["", "base"]
    asked = [json.loads(line) for line in (tmp_path / "out/questions.jsonl").open()]
    read = (tmp_path / "out/sky.jsonl").read_text()
    for question in asked:
        assert question["question"] not in read  # although the fact itself is
        assert question["options"][question["answer"]] in read
    for row in rows:
        summary = json.loads((tmp_path / "out" / row["summary"]).read_text())
        assert summary["n"] == len(asked) >= 40
        cost = float(row["price_per_hour"]) * summary["seconds"] / 3600 / summary["tokens"] * 100_000
        assert f"{row['model']}: {100 * summary['accuracy']:.1f} %" in done.stdout
        assert f"at {cost:.3g}" in done.stdout
    picture = (tmp_path / "out/cost.svg").read_text()
    assert all(row["model"] in picture for row in rows)
    assert "1 USD an hour assumed" in picture
