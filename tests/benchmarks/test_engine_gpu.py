"""benchmarks/engine_gpu.py on CPUs: all of its cases run, and its verdicts follow from the figures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_gpu import LATE, PROBES, STEPS, verdict

ROOT = Path(__file__).resolve().parents[2]


def figures(**changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    probe = {"links": 11.0, "slowest_link": 10.0, "held_up": 0.0, "slowed_down": 0.1, "communicator_mib": 300.0}
    found = {case.name: dict(probe) for case in PROBES}
    found |= {case.name: {"step_seconds": 2.0, "loss": 10.0} for case in STEPS}
    for name, more in changed.items():
        kind, number = name.split("_")
        found[(PROBES if kind == "probe" else STEPS)[int(number)].name].update(more)
    return found


@pytest.mark.unit
def test_case_names_are_unique() -> None:
    assert len({case.name for case in [*PROBES, *STEPS]}) == len(PROBES) + len(STEPS)
    assert {(case.queues, case.bound) for case in PROBES} == {(8, True), (8, False), (4, True), (4, False)}


@pytest.mark.unit
def test_good_and_bad_results_have_their_verdicts() -> None:
    well = verdict(figures(step_2={"step_seconds": 1.6}))
    assert "a late message holds up computation in no case" in well
    assert "two virtual stages: 1.25 times as fast as DeepSpeed on the same ranks" in well
    assert "GPU_MAX_HW_QUEUES=4 in the place of 8: 1.25 times the step" in well
    assert well[-1] == "no case failed"
    held = verdict(figures(probe_2={"held_up": LATE}))
    assert held[0] == f"a late message holds up computation with: {PROBES[2].name}"
    assert "4 queues" in held[0]
    assert any("do not train alike" in line for line in verdict(figures(step_2={"loss": 9.0})))


@pytest.mark.unit
def test_a_hanging_case_is_reported_without_a_verdict() -> None:
    found = figures()
    found[STEPS[2].name] = {"failed": "not done within 100 s"}
    lines = verdict(found)
    assert not any("times as fast" in line for line in lines)
    assert lines[-1] == f"failed: {STEPS[2].name}"


@pytest.mark.slow
@pytest.mark.distributed
def test_all_cases_on_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    words = ["benchmarks/engine_gpu.py", "--device", "cpu", "--small", "--json", str(tmp_path / "figures.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*start, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no case failed" in done.stdout, done.stdout
    found = json.loads((tmp_path / "figures.json").read_text())
    losses = [found[case.name]["loss"] for case in STEPS]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert all(found[case.name]["links"] > 0 for case in PROBES)
