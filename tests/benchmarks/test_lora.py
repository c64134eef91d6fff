"""benchmarks/lora.py runs and counts the optimizer's bytes; times are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_optimizer_states_cover_the_adapter_only(tmp_path: Path) -> None:
    sizes = ["--hidden", "128", "--layers", "1", "--vocab", "256", "--seq", "32", "--batch", "1", "--steps", "2"]
    command = [sys.executable, ROOT / "benchmarks/lora.py", *sizes, "--threads", "1", "--json", tmp_path / "out.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    for name, elements in (("full", report["parameters"]), ("lora", report["trained"])):
        assert report["bytes"][name] == pytest.approx(12 * elements, abs=64)
    assert f"{report['bytes_ratio']:.4f} of them" in done.stdout
