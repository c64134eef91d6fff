"""The planner's model of megatron-core's order of passes equals megatron-core's and torch's own tables, is free of
deadlocks, and has the idle time given by theory and by another simulation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from megatron.planner.cost.interleaved import ChunkPass, dependencies, pass_order, simulate, timeline
from megatron.planner.cost.megatron_moments import in_flight_by_chunk
from megatron.planner.cost.schedule import ScheduleError, idle_share

pytestmark = pytest.mark.unit

GRID = list(itertools.product((4, 8), (1, 2, 5, 10), (16, 32)))


def orders(p: int, v: int, m: int) -> list[list[ChunkPass]]:
    return [pass_order(p, v, m, rank) for rank in range(p)]


@dataclass
class _Group:
    """The part of a pipeline's process group that megatron-core needs to count micro-batches."""

    ranks: int
    own: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


@dataclass
class _Links:
    pp_group: _Group
    virtual_pipeline_model_parallel_size: int | None


@pytest.mark.parametrize(("p", "v", "m"), [*GRID, (2, 2, 4), (4, 3, 4), (8, 5, 12)])
def test_the_order_is_megatron_cores(p: int, v: int, m: int) -> None:
    """Its table of chunks, and its number of warm-up passes before the first backward pass."""
    from megatron.core.pipeline_parallel import schedules

    table = [(chunk, number) for number, chunk in schedules.get_schedule_table(m, v, p if v > 1 else m)]
    for rank, order in enumerate(orders(p, v, m)):
        links: Any = _Links(_Group(p, rank), v if v > 1 else None)
        _, _, warm_up, _ = schedules.get_pp_rank_microbatches(m, v, p, p2p_communicator=links)
        assert [one[1:] for one in order if one.kind == "forward"] == table
        backward = [(one.chunk, one.micro_batch) for one in order if one.kind == "backward"]
        assert backward == [(v - 1 - chunk, number) for chunk, number in table]
        # the first backward pass follows the warm-up and, if there is one, a further forward pass
        first = next(number for number, one in enumerate(order) if one.kind == "backward")
        assert first == min(warm_up + 1, v * m)


@pytest.mark.parametrize(("p", "v", "m"), [(4, 2, 16), (8, 5, 16), (8, 2, 32)])
def test_the_order_is_torchs_too(p: int, v: int, m: int) -> None:
    """torch's Interleaved1F1B, an independent implementation of the same paper."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    names = {"FORWARD": "forward", "FULL_BACKWARD": "backward"}
    for order, theirs in zip(orders(p, v, m), get_schedule_ops("Interleaved1F1B", p, m, v), strict=True):
        expected = [
            (names[action.computation_type.name], action.stage_index // p, action.microbatch_index)
            for action in theirs
            if action is not None
        ]
        assert [tuple(one) for one in order] == expected


@pytest.mark.parametrize(("p", "v", "m"), GRID)
def test_no_rank_waits_for_ever_and_every_pass_is_done_once(p: int, v: int, m: int) -> None:
    steps = dependencies(orders(p, v, m), v)
    assert len(steps) == len({(step.rank, step.work) for step in steps}) == 2 * p * v * m
    for number, step in enumerate(steps):
        assert step.before < number
        stage = step.work.chunk * p + step.rank
        if step.before >= 0:
            other = steps[step.before]
            assert other.work.chunk * p + other.rank == stage + (-1 if step.work.kind == "forward" else 1)
            assert (other.work.kind, other.work.micro_batch) == (step.work.kind, step.work.micro_batch)
        else:
            assert stage == (0 if step.work.kind == "forward" else p * v - 1)


def test_an_order_that_cannot_be_executed_is_found() -> None:
    """Three mistakes are found: a backward pass that is too early, two swapped messages, a missing pass."""
    early = orders(4, 2, 8)
    first = next(number for number, one in enumerate(early[0]) if one.kind == "backward")
    early[0].insert(0, early[0].pop(first))
    with pytest.raises(ScheduleError, match="ranks wait for each other"):
        dependencies(early, 2)
    exchanged = orders(4, 2, 8)
    exchanged[1][0], exchanged[1][1] = exchanged[1][1], exchanged[1][0]
    with pytest.raises(ScheduleError, match=r"forward link from rank 0 to rank 1: message 0 is sent for \[\(0, 0\)\]"):
        dependencies(exchanged, 2)
    short = orders(4, 2, 8)
    short[3].pop()
    with pytest.raises(ScheduleError, match=r"backward link from rank 0 to rank 3|backward link from rank 3 to rank 2"):
        dependencies(short, 2)


@pytest.mark.parametrize(("p", "v", "m"), [*GRID, (1, 1, 4), (2, 5, 6)])
def test_without_messages_idle_time_is_the_papers(p: int, v: int, m: int) -> None:
    found = simulate(p, v, m, [1 / v] * (p * v), [2 / v] * (p * v))
    assert found.idle_over_busy == pytest.approx((p - 1) / (v * m))
    assert found.idle == pytest.approx(1 - 1 / (1 + (p - 1) / (v * m)))


@pytest.mark.parametrize(
    ("v", "m", "percent"),
    [(2, 16, 22.5), (5, 16, 10.4), (10, 16, 7.7), (2, 32, 11.3), (5, 32, 5.2), (10, 32, 3.8)],
)
def test_with_messages_it_is_what_another_simulation_found(v: int, m: int, percent: float) -> None:
    """Percent of the busy time on 8 ranks, with messages that take a hundredth of a stage's forward pass, by an
    independent simulation of torch's action lists over pairs of ranks."""
    found = simulate(8, v, m, [1 / v] * (8 * v), [2 / v] * (8 * v), 0.01)
    assert 100 * found.idle_over_busy == pytest.approx(percent, abs=0.06)


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 12), (4, 5, 24), (8, 5, 48), (8, 10, 64)])
def test_long_steps_are_shortened_without_a_difference(p: int, v: int, m: int) -> None:
    """The last chunk is longer than the others, because of the head."""
    forward = [(1 + 0.02 * (stage % 3)) / v for stage in range(p * v)]
    forward[-1] *= 1.6
    backward = [2 * one for one in forward]
    whole = max(one.stop for one in timeline(p, v, m, forward, backward, 0.01))
    assert simulate(p, v, m, forward, backward, 0.01).seconds == pytest.approx(whole, rel=1e-3)


def test_no_more_is_in_flight_than_the_paper_says() -> None:
    """At most 2 (p - rank - 1) + (v - 1) p + 1 passes of chunks (Narayanan et al. 2021); without virtual stages,
    p - rank micro-batches."""
    for p, v, m in GRID:
        for rank in range(p):
            most = max(sum(counts) for _, counts in in_flight_by_chunk(p, v, m, rank))
            assert most == (p - rank if v == 1 else min(v * m, 2 * (p - rank - 1) + (v - 1) * p + 1))


@pytest.mark.parametrize(("p", "v", "m"), [(4, 1, 8), (4, 2, 8), (2, 2, 4)])
def test_the_order_is_the_engines(p: int, v: int, m: int) -> None:
    """Compared with the recorded operations of the engine's ranks."""
    from benchmarks.engine_order import record

    for order, events in zip(orders(p, v, m), record(p, v, m), strict=True):
        executed = [
            ChunkPass(one.what, one.chunk, one.micro_batch) for one in events if one.what in ("forward", "backward")
        ]
        assert executed == order


def test_chunks_end_one_after_the_other() -> None:
    """Rank 0 ends with chunk 0; the last backward pass of each further chunk is a group of p passes earlier, which
    leaves time to hide the reduction of its gradients."""
    left = simulate(8, 5, 16, [0.2] * 40, [0.4] * 40).left
    assert left[0][0] == 0.0
    assert list(left[0]) == sorted(left[0])
    assert left[0][1] == pytest.approx(8 * 0.4)
    assert left[7][0] == pytest.approx(7 * 0.4)


def test_a_chunk_waits_for_its_weights() -> None:
    p, v = 2, 2
    at_once = simulate(p, v, 4, [1.0] * 4, [2.0] * 4).seconds
    late = simulate(p, v, 4, [1.0] * 4, [2.0] * 4, ready=[[3.0, 0.0], [0.0, 0.0]]).seconds
    hidden = simulate(p, v, 4, [1.0] * 4, [2.0] * 4, ready=[[0.0, 2.0], [1.0, 0.0]]).seconds
    assert late == at_once + 3.0
    assert hidden == at_once


def test_a_link_carries_one_message_at_a_time() -> None:
    """If messages take longer than the passes between them, they limit the speed."""
    work = timeline(2, 1, 8, [1.0, 1.0], [1.0, 1.0], 5.0)
    arrivals = sorted(one.start for one in work if one.stage == 1 and one.kind == "forward")
    assert all(later - earlier >= 5.0 for earlier, later in itertools.pairwise(arrivals[:2]))
    assert idle_share(work, 2) > 0.5
