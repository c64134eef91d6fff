"""benchmarks/conversion.py runs, rejects wrong results, and bounds memory at the 8B size; times are not tested."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(work: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    """All runs by tool; the script first compares the converted folders bit for bit."""
    command = [sys.executable, ROOT / "benchmarks" / "conversion.py", "--work", work, "--json", work / "runs.json"]
    done = subprocess.run([*map(str, command), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| task | tool |" in done.stdout
    return json.loads((work / "runs.json").read_text())


@pytest.mark.unit
def test_tiny(tmp_path: Path) -> None:
    runs = benchmark(tmp_path, "--size", "tiny", "--rounds", "1", "--no-baseline")
    assert len(runs) == 4
    assert runs["HF -> NeoX: convert_hf to-neox"][0]["output"] > 1e7


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_8b() -> None:
    """16 GB each way, end to end, bit-exact, in less than half a GiB."""
    needed = 55e9
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        pytest.skip(f"{tempfile.gettempdir()} has less than {needed:,.0f} bytes free")
    with tempfile.TemporaryDirectory() as folder:
        runs = benchmark(Path(folder), "--size", "8b", "--tp", "8", "--rounds", "1", "--no-baseline")
    for tool, all_ in runs.items():
        assert all_[0]["output"] > 16e9, tool
        assert all_[0]["anonymous_mib"] < 512, tool
