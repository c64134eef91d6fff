"""Rank 0 controls a program: the other ranks wait as long as necessary, and end the same way as rank 0."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.common.errors import UserError
from megatron.supervision.status_store import Whereabouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Counting(Whereabouts):
    """Counts signs of progress."""

    moves = 0

    def at(self, phase: str) -> None:
        self.moves += 1
        super().at(phase)


def _drive(rank: int, program: Any, whereabouts: Whereabouts | None = None) -> Any:
    from megatron.evaluation import driver

    driver.KEEP_WAITING_SECONDS = 0.01
    engine: Any = SimpleNamespace(place=SimpleNamespace(rank=rank, device=torch.device("cpu")))
    return driver.drive(engine, None, whereabouts or Whereabouts(), program)  # type: ignore[arg-type]


def _busy(rank: int, world_size: int) -> tuple[Any, int]:
    whereabouts = Counting()

    def program(model: Any) -> str:
        while whereabouts.moves < 6:  # until the other ranks have been told to wait several times
            time.sleep(0.001)
        return "done"

    return _drive(rank, program, whereabouts), whereabouts.moves


def test_a_busy_rank_0_is_not_a_hang() -> None:
    (result, _), *others = run_ranks(_busy, 3, timeout=60)
    assert result == "done"
    assert all(nothing is None and moves >= 6 for nothing, moves in others)


def _mistaken(rank: int, world_size: int) -> str:
    def program(model: Any) -> None:
        raise UserError("questions.jsonl: no such file")

    with pytest.raises(UserError) as caught:
        _drive(rank, program)
    return str(caught.value)


def test_a_user_error_ends_all_ranks_with_its_text() -> None:
    assert run_ranks(_mistaken, 3, timeout=60) == ["questions.jsonl: no such file"] * 3


def _broken(rank: int, world_size: int) -> str:
    def program(model: Any) -> None:
        raise ZeroDivisionError

    try:
        _drive(rank, program)
    except ZeroDivisionError:
        return "failed"
    return "released"


def test_a_fault_of_the_program_releases_the_others() -> None:
    assert run_ranks(_broken, 3, timeout=60) == ["failed", "released", "released"]
