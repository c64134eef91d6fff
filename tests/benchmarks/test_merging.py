"""benchmarks/merging.py runs, checks its result, and prints floor, bound and the arithmetic for 70B."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_tiny(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "merging.py", "--work", tmp_path, "--json", tmp_path / "runs.json"]
    done = subprocess.run([*map(str, command), "--size", "tiny", "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert set(runs) == {"floor", "tools/merge"}
    assert runs["floor"][0]["output"] > 1e7
    assert runs["tools/merge"][0]["anonymous_mib"] < 1024
    assert re.search(r"round 1: wall .* s, (within|above) max\(1.3 x floor, CPU / 2\)", done.stdout)
    assert "847 GB move" in done.stdout
