"""The exchange between steps: all ranks get every rank's information, and slow phases are attributed to a rank."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _exchange(rank: int, world_size: int) -> Any:
    import torch

    from megatron.supervision.step_sync import synchronize_step

    cpu = torch.device("cpu")
    quiet = synchronize_step(cpu, 0, False, {})
    times = dict.fromkeys(("step", "data", "forward", "backward", "optimizer"), 0.25 if rank == 2 else 0.125)
    times |= {"pipeline": 0.0 if rank == 1 else 0.5, "reduce": 3600.0}
    loud = synchronize_step(cpu, signal.SIGUSR1 if rank == 1 else 0, rank == 0, times)
    return quiet, loud


def test_all_ranks_know_the_same() -> None:
    told = run_ranks(_exchange, 4)
    assert told == [told[0]] * 4
    quiet, loud = told[0]
    assert (quiet.stop, quiet.profile, quiet.slowest) == (None, False, {})
    assert loud.stop is signal.SIGUSR1
    assert loud.profile
    assert loud.slowest["forward"] == (0.25, 2), "the longest"
    assert loud.slowest["pipeline"] == (0.0, 1), "the shortest: the others wait"
    assert loud.slowest["reduce"][0] == 3600.0


CASE = Case(seq=32)


def _slow_rank(rank: int, world_size: int, slow: int) -> dict[str, tuple[float, int]]:
    """Phases of a step on TP1 x PP2 x DP2 in which one rank computes its forward passes slowly."""
    import torch

    from megatron.supervision.status_store import Whereabouts
    from megatron.supervision.step_sync import synchronize_step
    from megatron.supervision.step_timers import StepTimers
    from tests.support.engine_runs import build, make_samples, step

    args = CASE.neox(world_size=world_size, pipe_parallel_size=2)
    timers = StepTimers(Whereabouts(), torch.device("cpu"))
    engine = build(args, CASE, around=timers.during)
    if rank == slow:
        _, layer = next(engine.numbered_layers())
        layer.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    for iteration in (1, 2):
        with timers.step(iteration, first=False):
            step(engine, args, make_samples(CASE, args.train_batch_size))
    assert timers.whereabouts.iteration == 2
    mine = timers.seconds()
    assert sum(time for phase, time in mine.items() if phase != "step") == pytest.approx(mine["step"], rel=0.2)
    return synchronize_step(torch.device("cpu"), 0, False, mine).slowest


@pytest.mark.parametrize("slow", [1, 2])
def test_a_slow_forward_pass_is_seen_as_such(slow: int) -> None:
    slowest = run_ranks(_slow_rank, 4, slow)[0]
    seconds, rank = slowest["forward"]
    assert rank == slow
    assert seconds > 0.6, "two micro-batches"
    assert slowest["step"][0] > 0.6
