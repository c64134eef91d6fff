"""Tests of everything else in a run pass with engine: megatron, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
# (file, tests in it that are specific to DeepSpeed)
SUITES: list[tuple[str, str]] = [
    ("trainer/test_runs.py", ""),
    ("trainer/test_async_runs.py", ""),
    ("trainer/test_nonfinite.py", "would_be_applied"),
    ("supervision/test_replicas.py", ""),
    ("supervision/test_signals.py", ""),
    ("supervision/test_watchdog_on_ranks.py", "timeout_reaches or by_itself"),
    ("supervision/test_profiler.py", ""),
    ("supervision/test_step_sync.py", ""),
    ("checkpoint/test_layouts.py", ""),
    ("evaluation/test_scoring.py", ""),
    ("evaluation/test_multiple_choice.py", ""),
    ("evaluation/test_documents.py", ""),
    ("generation/test_program.py", ""),
    ("generation/test_generate.py", "one_process or tied"),
]


@pytest.mark.parametrize(("suite", "left_out"), SUITES, ids=[suite for suite, _ in SUITES])
def test_a_suite_passes(suite: str, left_out: str) -> None:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{suite}", "-m", "not slow"]
    if left_out:
        words += ["-k", f"not ({left_out})"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"NEOX_TEST_ENGINE": "megatron", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
