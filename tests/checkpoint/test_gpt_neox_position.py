"""A run continues from a GPT-NeoX checkpoint with its iteration, schedule and samples, and new optimizer states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.start import position_of_gpt_neox
from megatron.common.errors import CheckpointError
from tests.support.checkpoints import write_weights
from tests.support.models import Case
from tests.support.ranks import run_ranks

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16)


def _load(rank: int, world_size: int, keys: dict[str, Any]) -> Any:
    from tests.support.engine_runs import build, load

    args = CASE.neox(world_size=world_size, model_parallel_size=world_size, from_scratch=False, **keys)
    engine = build(args, CASE)
    try:
        state = load(engine, args)
    except CheckpointError as error:
        return str(error)
    return state.iteration, state.consumed_samples, engine.counters.steps, engine.counters.samples


@pytest.mark.distributed
def test_a_run_of_gpt_neox_goes_on_where_it_stood(tmp_path: Path) -> None:
    write_weights(tmp_path, CASE.neox(world_size=2, model_parallel_size=2).shape, tp=2, manifest=False)
    (tmp_path / "global_step0").rename(tmp_path / "global_step120")
    (tmp_path / "latest").write_text("global_step120")
    keys = {"load": str(tmp_path), "train_iters": 200}
    batch = 2 * 2  # micro-batch x accumulation
    assert run_ranks(_load, 2, keys | {"no_load_optim": True}) == [(120, 120 * batch, 120, 120 * batch)] * 2
    assert run_ranks(_load, 2, keys | {"finetune": True}) == [(0, 0, 0, 0)] * 2
    refused = run_ranks(_load, 2, keys)
    assert "has no optimizer states: of GPT-NeoX's files those of ZeRO stage 1 are read" in refused[0]


@pytest.mark.unit
def test_a_folder_without_an_iteration_is_named() -> None:
    assert position_of_gpt_neox(Path("runs/global_step7"), 16).consumed_samples == 112
    with pytest.raises(CheckpointError, match=r"runs/0 was written by GPT-NeoX or for it, and its name says no iterat"):
        position_of_gpt_neox(Path("runs/0"), 16)
