"""Each engine resumes the other's checkpoints with a bit-equal state and the uninterrupted run's losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.verify import verify_checkpoint
from tests.support.checkpoint_runs import STOP
from tests.support.layouts import Layout, resume_elsewhere, save_and_go_on, whole_state
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=4, head_dim=8, layers=4, intermediate=40, vocab=61, seq=16)
TIED = replace(CASE, tied=True)
BLOCK = 1 << 20
DEEPSPEED: dict[str, Any] = {}
MEGATRON: dict[str, Any] = {"engine": "megatron"}
VIRTUAL: dict[str, Any] = {"engine": "megatron", "virtual_pipe_parallel_size": 2}
SLICED = {"sequence_parallel": True}

Run = tuple[Layout, dict[str, Any]]


def _save(rank: int, world_size: int, keys: dict[str, Any], *arguments: Any) -> Any:
    return save_and_go_on(rank, world_size, *arguments, **keys)


def _resume(rank: int, world_size: int, keys: dict[str, Any], *arguments: Any) -> Any:
    return resume_elsewhere(rank, world_size, *arguments, **keys)


def ranks_of(layout: Layout) -> int:
    tp, pp, dp = layout
    return tp * pp * dp


def goes_on(case: Case, precision: str, first: Run, second: Run, folder: Path) -> None:
    (saved_at, saver), (read_at, reader) = first, second
    saved, again = str(folder / "first"), str(folder / "again")
    went_on = run_ranks(_save, ranks_of(saved_at), saver, case, saved_at, precision, saved, BLOCK)[0]
    found, *_ = run_ranks(_resume, ranks_of(read_at), reader, case, read_at, precision, saved, again, BLOCK)[0]
    before, after = (whole_state(Path(where) / f"global_step{STOP}") for where in (saved, again))
    assert before.keys() == after.keys()
    assert [key for key, tensor in before.items() if not torch.equal(tensor, after[key])] == []
    for where in (saved, again):
        assert verify_checkpoint(Path(where) / f"global_step{STOP}") == []
    torch.testing.assert_close(torch.tensor(found), torch.tensor(went_on), rtol=1e-6, atol=0)
    assert len(found) == 2
    if (saved_at, saver) == (read_at, reader):
        assert found == went_on, "not to the bit"


@pytest.mark.parametrize(
    ("case", "precision", "first", "second"),
    [
        pytest.param(
            CASE, "fp32", ((2, 2, 1), DEEPSPEED), ((1, 2, 2), VIRTUAL), id="deepspeed tp2pp2 to megatron pp2v2dp2"
        ),
        pytest.param(
            TIED, "fp32", ((2, 2, 2), VIRTUAL | SLICED), ((1, 2, 1), DEEPSPEED), id="tied, all to deepspeed pp2"
        ),
    ],
)
def test_the_other_engine_goes_on(case: Case, precision: str, first: Run, second: Run, tmp_path: Path) -> None:
    goes_on(case, precision, first, second, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "precision", "first", "second"),
    [
        pytest.param(CASE, "fp32", ((1, 2, 2), VIRTUAL), ((1, 2, 2), VIRTUAL), id="the same"),
        pytest.param(CASE, "fp32", ((1, 2, 2), VIRTUAL), ((4, 1, 1), MEGATRON), id="v2 to tp4"),
        pytest.param(CASE, "fp32", ((1, 1, 4), MEGATRON), ((2, 2, 1), VIRTUAL), id="dp4 to tp2pp2v2"),
        pytest.param(TIED, "fp32", ((1, 1, 1), DEEPSPEED), ((1, 4, 1), MEGATRON), id="tied, one to pp4"),
        pytest.param(TIED, "fp32", ((1, 4, 2), MEGATRON), ((2, 2, 1), DEEPSPEED), id="tied, pp4dp2 to deepspeed"),
        pytest.param(CASE, "bfloat16", ((1, 2, 2), DEEPSPEED), ((1, 2, 2), VIRTUAL), id="bf16, to megatron"),
        pytest.param(CASE, "bfloat16", ((1, 2, 2), VIRTUAL), ((1, 4, 1), DEEPSPEED), id="bf16, to deepspeed"),
    ],
)
def test_many_pairs(case: Case, precision: str, first: Run, second: Run, tmp_path: Path) -> None:
    goes_on(case, precision, first, second, tmp_path)


def _confused(rank: int, world_size: int, folder: str, again: str) -> str:
    """The error of a load in which weights and masters disagree."""
    from megatron.checkpoint import load
    from megatron.common.errors import CheckpointError

    load_layers = load.load_layers

    def slightly_wrong(engine: Any, *arguments: Any) -> Any:
        conversions = load_layers(engine, *arguments)
        _, layer = next(engine.numbered_layers())
        next(layer.parameters()).data.view(-1)[0] += 1
        return conversions

    load.load_layers = slightly_wrong  # type: ignore[assignment]
    try:
        resume_elsewhere(rank, world_size, CASE, (1, 2, 1), "fp32", folder, again, BLOCK, **VIRTUAL)
    except CheckpointError as error:
        return str(error)
    return ""


def test_masters_that_are_not_the_weights_are_refused(tmp_path: Path) -> None:
    """In fp32 the masters are views of the weights: they are compared before they are overwritten."""
    run_ranks(_save, 2, DEEPSPEED, CASE, (1, 2, 1), "fp32", str(tmp_path / "first"), BLOCK)
    said = run_ranks(_confused, 2, str(tmp_path / "first"), str(tmp_path / "again"))
    assert "the fp32 masters in the optimizer files are not the weights in the layer files" in said[0]
