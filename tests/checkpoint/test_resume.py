"""Save and load through the engine: a resumed run is the uninterrupted one, and nothing is loaded by halves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import TrainState, load_checkpoint, save_checkpoint
from tests.support.engine_runs import build, make_samples, rank_parameters, step
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

BATCH, STEPS, STOP = 8, 4, 2
CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=40, vocab=64, seq=16)
TIED = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=40, vocab=64, seq=16, tied=True)


def arguments(case: Case, tp: int, pp: int, dp: int, **keys: Any) -> Any:
    return case.neox(
        model_parallel_size=tp,
        pipe_parallel_size=pp,
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=BATCH // dp,
        train_iters=STEPS,
        world_size=tp * pp * dp,
        **keys,
    )


def quiet(line: str) -> None:
    pass


def train(engine: Any, args: Any, state: TrainState, steps: int) -> list[tuple[float, float]]:
    samples = make_samples(CASE, BATCH * STEPS)
    history = []
    for _ in range(steps):
        batch = samples[state.consumed_samples : state.consumed_samples + BATCH]
        history.append(step(engine, args, batch, state.iteration))
        state.iteration += 1
        state.consumed_samples += BATCH
    return history


def masters(engine: Any) -> list[torch.Tensor]:
    """This rank's part of the fp32 masters."""
    optimizer = engine.optimizer
    bf16 = type(optimizer).__name__ == "BF16_Optimizer"
    groups = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    return [group.detach().clone() for group in groups]


def _run_through(rank: int, world_size: int, case: Case, split: tuple, precision: str, save: str) -> Any:
    args = arguments(case, *split, precision=precision, save=save, checkpoint_factor=STOP)
    engine = build(args, case)
    state = TrainState()
    history = train(engine, args, state, STOP)
    folder = save_checkpoint(engine, args, state, data_fingerprints={"toy": "1"}, log=quiet)
    draws = random.random(), float(torch.rand(()))
    history += train(engine, args, state, STEPS - STOP)
    return history, rank_parameters(engine).tensors, masters(engine), draws, str(folder)


def _resume(rank: int, world_size: int, case: Case, split: tuple, precision: str, load: str) -> Any:
    args = arguments(case, *split, precision=precision, load=load, from_scratch=False)
    engine = build(args, case, seed=1)  # other weights: what is right afterwards comes from the files
    random.seed(rank + 100)
    torch.manual_seed(rank + 100)
    lines: list[str] = []
    state = load_checkpoint(engine, args, data_fingerprints={"toy": "2"}, log=lines.append)
    assert state is not None
    assert (state.iteration, state.consumed_samples, engine.global_steps) == (STOP, STOP * BATCH, STOP)
    draws = random.random(), float(torch.rand(()))
    history = train(engine, args, state, STEPS - STOP)
    return history, rank_parameters(engine).tensors, masters(engine), draws, lines


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
    resumed = run_ranks(_resume, 8, case, split, precision, f"{tmp_path}/")
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
