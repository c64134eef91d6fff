"""Background saves contain the state of their step, whatever training does meanwhile."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.background import BackgroundSaver
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.rank_files import HostCopies
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.verify import verify_checkpoint
from tests.support.checkpoint_runs import (
    CASE,
    STEPS,
    STOP,
    TIED,
    Gate,
    arguments,
    file_differences,
    masters,
    resume,
    train,
)
from tests.support.engine_runs import build, rank_parameters
from tests.support.log_lines import LogLines
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _both_ways(rank: int, world_size: int, case: Case, split: tuple, precision: str, root: str, alias: bool) -> Any:
    """Save a step synchronously and in the background; the latter is written only after two more steps."""
    args = arguments(case, *split, precision=precision, save=f"{root}/sync", checkpoint_factor=STOP)
    engine = build(args, case)
    state = TrainState()
    history = train(engine, args, state, STOP)
    save_checkpoint(engine, args, state, data_fingerprints={"toy": "1"})
    if alias:  # the mutation that the comparison must detect
        HostCopies.snapshot = lambda self, contents: contents  # type: ignore[method-assign]
    gate, log = Gate(), LogLines()
    saver = BackgroundSaver(engine, args.replace(save=f"{root}/async"), {"toy": "1"})
    saver.begin(state)
    draws = random.random(), float(torch.rand(()))
    for _ in range(STEPS - STOP):
        history += train(engine, args, state, 1)
        saver.poll()
    assert saver.completed is None
    gate.open()
    saver.wait()
    assert saver.completed == STOP
    return history, rank_parameters(engine).tensors, masters(engine), draws, log.lines


@pytest.mark.parametrize("alias", [False, True], ids=["", "mutation-live-tensors"])
@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(CASE, "fp32", id="fp32"),
        pytest.param(TIED, "bfloat16", id="tied-bf16"),
    ],
)
def test_a_background_save_is_the_saved_steps_state(case: Case, precision: str, alias: bool, tmp_path: Path) -> None:
    """Every file is bit-equal to that of a synchronous save, and a run that resumes from it equals the uninterrupted
    one."""
    through = run_ranks(_both_ways, 8, case, (2, 2, 2), precision, str(tmp_path), alias)
    folders = [tmp_path / way / f"global_step{STOP}" for way in ("sync", "async")]
    differing = file_differences(*folders)
    if alias:
        assert any("layer_" in place for place in differing)
        assert any("exp_avg" in place for place in differing)
        return
    assert differing == []
    one, other = map(read_manifest, folders)
    assert {n: e.tensors for n, e in one.files.items()} == {n: e.tensors for n, e in other.files.items()}
    assert one.provenance | {"created": 0, "config": 0} == other.provenance | {"created": 0, "config": 0}
    assert [verify_checkpoint(folder) for folder in folders] == [[], []]
    assert {p.name for p in folders[0].iterdir()} == {p.name for p in folders[1].iterdir()}
    assert any(line.startswith(f"saved {folders[1]}: training waited") for line in through[0][4])
    resumed = run_ranks(resume, 8, case, (2, 2, 2), precision, str(tmp_path / "async"))
    for one_rank, other_rank in zip(through, resumed, strict=True):
        assert one_rank[0][STOP:] == other_rank[0], "losses or gradient norms"
        assert all(torch.equal(tensor, other_rank[1][key]) for key, tensor in one_rank[1].items()), "weights"
        assert all(torch.equal(a, b) for a, b in zip(one_rank[2], other_rank[2], strict=True)), "fp32 masters"
        assert one_rank[3] == other_rank[3], "random numbers"
