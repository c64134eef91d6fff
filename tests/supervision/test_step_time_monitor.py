"""Which series of step times are flagged, and which rank is named."""

from __future__ import annotations

import random

import pytest

from megatron.supervision.step_time_monitor import StepTimes

pytestmark = pytest.mark.unit

USUAL = {"data": 0.02, "forward": 0.9, "backward": 1.8, "pipeline": 0.2, "reduce": 0.1, "optimizer": 0.08}


def times(whose: dict[str, int] | None = None, **changed: float) -> dict[str, tuple[float, int]]:
    phases = USUAL | changed
    whole = {**phases, "step": sum(phases.values())}
    return {phase: (seconds, (whose or {}).get(phase, 0)) for phase, seconds in whole.items()}


def watcher(slow: float = 1.25, drift: float = 1.1) -> StepTimes:
    return StepTimes(slow, drift, lambda rank: f"rank {rank} on n{rank // 4}")


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "optimizer"])
def test_one_percent_a_step_is_flagged_with_its_phase(phase: str) -> None:
    """The step grows by 1 % a step, all of it in one phase, on rank 6 alone."""
    watch, lines = watcher(), []
    whole = sum(USUAL.values())
    for i in range(60):
        lines += watch.add(i + 1, times({phase: 6}, **{phase: USUAL[phase] + 0.01 * i * whole}))
    creeping = [line for line in lines if "creeps" in line]
    assert creeping, lines
    assert f"; {phase} takes" in creeping[0]
    assert "longest on rank 6 on n1" in creeping[0]
    assert "iterations 21 to 40" in creeping[0]
    assert "in iterations 1 to 20 (+" in creeping[0]


def test_network_time_is_not_attributed_to_a_rank() -> None:
    watch, lines = watcher(), []
    for i in range(40):
        lines += watch.add(i + 1, times(reduce=0.1 + 0.03 * i))
    assert lines
    assert all("reduce" in line and "on all ranks at once" in line for line in lines)


def test_noise_is_not_flagged() -> None:
    rng, watch, lines = random.Random(0), watcher(), []
    for i in range(2000):
        noisy = {phase: seconds * rng.uniform(0.92, 1.08) for phase, seconds in USUAL.items()}
        lines += watch.add(i + 1, times(**noisy))
    assert lines == []


def test_a_slow_step_names_rank_and_node_once() -> None:
    watch, lines = watcher(), []
    for i in range(30):
        lines += watch.add(i + 1, times({"backward": 9}, backward=3.0 if i == 20 else 1.8))
    assert len(lines) == 1
    assert "iteration 21 took 4.3 s, 1.39 x the running median: backward 3 s instead of 1.8 s" in lines[0]
    assert "longest on rank 9 on n2" in lines[0]


def test_many_slow_steps_are_one_line_and_a_count() -> None:
    """On a busy machine every fifth step is slow: 24 in 120 steps, of which three are reported, and all are counted."""
    watch, lines = watcher(drift=0), []
    slow = set(range(20, 140, 5))
    for i in range(1, 181):
        lines += watch.add(i, times(backward=4.0 if i in slow else 1.8))
    reported = [line for line in lines if "x the running median" in line]
    counts = [int(line.split()[0]) for line in lines if "more slow steps in iterations" in line]
    assert 1 <= len(reported) <= 4
    assert len(reported) + sum(counts) == len(slow)


def test_a_creep_is_reported_again_only_after_further_growth() -> None:
    watch, lines = watcher(slow=0), []
    for i in range(400):
        lines += watch.add(i + 1, times(forward=0.9 if i < 20 else 1.5))
    assert len(lines) == 1


def test_zero_turns_the_checks_off() -> None:
    watch, lines = watcher(slow=0, drift=0), []
    for i in range(100):
        lines += watch.add(i + 1, times(forward=0.9 * 1.05**i))
    assert lines == []
