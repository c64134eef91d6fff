"""benchmarks/resharding.py runs and verifies its output before it prints figures; times are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.unit
def test_tiny(tmp_path: Path) -> None:
    words = ["--work", str(tmp_path), "--size", "tiny", "--rounds", "1", "--json", str(tmp_path / "runs.json")]
    command = [sys.executable, str(ROOT / "benchmarks/resharding.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TP2 PP2 DP2 to TP1 PP4 DP1" in done.stdout
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert runs["convert_hf reshard --optimizer"][0]["output"] > 7e7
