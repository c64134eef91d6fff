"""benchmarks/kernels.py runs without a GPU, says so, and measures every operation forward and backward."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).resolve().parents[2]


def test_every_operation_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/kernels.py", "--device", "cpu", "--models", "8B", "--tokens", "8"]
    command += ["--runs", "2", "--no-compile", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this measures the PyTorch references" in done.stdout
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts["copy_gb_per_s"] > 0
    ops = ("rms_norm", "add_rms_norm", "rotary", "swiglu", "cross_entropy")
    seen = {(r["op"], r["direction"], r["tensor_parallel"], r["who"]) for r in facts["results"]}
    assert seen == {
        (op, direction, tp, who)
        for op in ops
        for direction in ("forward", "backward")
        for tp in (1, 8)
        for who in ("ours", "torch")
    }
    assert (tmp_path / "r.png").stat().st_size > 1000
