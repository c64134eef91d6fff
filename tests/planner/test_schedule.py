"""The timeline is DeepSpeed's schedule: every pass once, in a valid order, with the textbook bubble."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.planner.cost.moments import in_flight
from megatron.planner.cost.parallel_layout import ParallelLayout
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _timeline(rank: int, world_size: int, m: int, forward: list[float], backward: list[float]) -> Any:
    from megatron.planner.cost.schedule import idle_share, timeline

    work = timeline(m, forward, backward)
    passes = [(one.stage, one.kind, one.micro_batch, one.start, one.stop) for one in work]
    return passes, idle_share(work, len(forward))


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (4, 8), (8, 16), (8, 3)])
def test_equal_stages_have_the_textbooks_bubble(p: int, m: int) -> None:
    """m + p - 1 passes, of which a fraction (p - 1) / (m + p - 1) is idle (Narayanan et al. 2021)."""
    passes, idle = run_ranks(_timeline, 1, m, [1.0] * p, [2.0] * p)[0]
    assert sorted((stage, kind, number) for stage, kind, number, _, _ in passes) == sorted(
        (stage, kind, number) for stage in range(p) for kind in ("forward", "backward") for number in range(m)
    )
    assert max(stop for *_, stop in passes) == pytest.approx(3.0 * (m + p - 1))
    assert idle == pytest.approx((p - 1) / (m + p - 1))
    times = {(stage, kind, number): (start, stop) for stage, kind, number, start, stop in passes}
    for (stage, kind, number), (start, _) in times.items():
        before = (stage - 1, kind, number) if kind == "forward" else (stage + 1, kind, number)
        assert start >= times.get(before, (0.0, 0.0))[1]
        if kind == "backward":
            assert start >= times[stage, "forward", number][1]


@pytest.mark.parametrize(("p", "m"), [(1, 3), (4, 8), (8, 16), (8, 3)])
def test_micro_batches_in_flight_match_the_planner(p: int, m: int) -> None:
    passes, _ = run_ranks(_timeline, 1, m, [1.0] * p, [2.0] * p)[0]
    layout = ParallelLayout(tensor=1, pipe=p, data=1, micro_batch=1, num_micro_batches=m)
    for stage in range(p):
        alive = most = 0
        for kind in [kind for s, kind, *_ in sorted(passes, key=lambda one: one[3]) if s == stage]:
            alive += 1 if kind == "forward" else -1
            most = max(most, alive)
        assert most == in_flight(layout, stage, done=0)


def test_a_slow_stage_makes_the_others_wait() -> None:
    even = run_ranks(_timeline, 1, 8, [1.0] * 4, [2.0] * 4)[0]
    slow = run_ranks(_timeline, 1, 8, [1.0, 1.0, 1.5, 1.0], [2.0, 2.0, 3.0, 2.0])[0]
    assert max(stop for *_, stop in slow[0]) > max(stop for *_, stop in even[0]) + 8 * 1.0
    assert slow[1] > even[1]
