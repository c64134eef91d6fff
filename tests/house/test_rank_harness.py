"""The rank harness itself: results arrive, failures are shown, hanging ranks are ended."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.distributed


def _sum(rank: int, world_size: int, value: int) -> int:
    tensor = torch.tensor([rank + value])
    dist.all_reduce(tensor)
    return int(tensor)


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the middle one is ill")
    dist.barrier()


def _hang(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(1000)


def test_results_by_rank() -> None:
    assert run_ranks(_sum, 4, 10) == [46] * 4


def test_a_failing_rank_is_shown() -> None:
    with pytest.raises(RankFailure, match="the middle one is ill"):
        run_ranks(_fail_on_one, 3)


def test_a_hanging_rank_is_killed() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="1 of 2 ranks failed"):
        run_ranks(_hang, 2, timeout=2)
    assert time.monotonic() - start < 60
