"""Save and load through the engine: a resumed run equals the uninterrupted one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.state import TrainState
from tests.support.checkpoint_runs import CASE, STEPS, STOP, TIED, arguments, masters, resume, train
from tests.support.engine_runs import build, rank_parameters
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _run_through(rank: int, world_size: int, case: Case, split: tuple, precision: str, save: str) -> Any:
    args = arguments(case, *split, precision=precision, save=save, checkpoint_factor=STOP)
    engine = build(args, case)
    state = TrainState()
    history = train(engine, args, state, STOP)
    folder = save_checkpoint(engine, args, state, data_fingerprints={"toy": "1"})
    draws = random.random(), float(torch.rand(()))
    history += train(engine, args, state, STEPS - STOP)
    return history, rank_parameters(engine).tensors, masters(engine), draws, str(folder)


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(CASE, "fp32", id="fp32"),
        pytest.param(TIED, "fp32", id="tied"),
        pytest.param(CASE, "bfloat16", id="bf16"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(case: Case, precision: str, tmp_path: Path) -> None:
    split = (2, 2, 2)
    through = run_ranks(_run_through, 8, case, split, precision, str(tmp_path))
    resumed = run_ranks(resume, 8, case, split, precision, f"{tmp_path}/")
    for one, other in zip(through, resumed, strict=True):
        assert one[0][STOP:] == other[0], "losses or gradient norms"
        assert one[1].keys() == other[1].keys()
        for key, tensor in one[1].items():
            assert torch.equal(tensor, other[1][key]), f"weights of {key}"
        for a, b in zip(one[2], other[2], strict=True):
            assert torch.equal(a, b), "fp32 masters"
        assert one[3] == other[3], "random numbers"
    assert any("data differs" in line and "toy" in line for line in resumed[0][4])
    assert all(lines == [] for *_, lines in resumed[1:]), "only rank 0 logs"
