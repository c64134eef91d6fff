"""Continuing GPT-NeoX's own checkpoint with its optimizer states gives its next losses, at its layout and at others.

`gpt_neox_run/` holds a checkpoint written by GPT-NeoX at TP1 PP2 DP2 and its losses of the following steps:
`python benchmarks/neox_continue.py --upstream DIR --python PYTHON --record tests/checkpoint/gpt_neox_run`.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.neox_continue import RECORDED_LAYOUT, SAVED, SMALL, make_inputs, our_keys
from megatron.checkpoint import zero_files
from megatron.checkpoint.saved import SavedCheckpoint
from megatron.common.errors import CheckpointError
from tests.support.ranks import RankFailure, run_ranks

RECORDED = Path(__file__).parent / "gpt_neox_run"
LOSSES = json.loads((RECORDED / "losses.json").read_text())


def _go_on(rank: int, size: int, keys: dict[str, Any], sums_are_means: bool = False) -> None:
    from megatron.neox_arguments import NeoXArgs
    from megatron.parallel.process_groups import form_groups
    from megatron.trainer.run import Run

    if sums_are_means:
        zero_files._gradient_factor = lambda content: 1
    logging.disable(logging.INFO)
    args = NeoXArgs.from_dict(keys, world_size=size)
    Run(args, form_groups(args)).execute()


def _keys(folder: Path, tp: int, pp: int, dp: int) -> dict[str, Any]:
    make_inputs(folder)
    shutil.copytree(RECORDED, folder / "theirs")
    keys = our_keys(folder, folder / "ours", "fp32", RECORDED_LAYOUT, dp, SMALL)
    return keys | {"model_parallel_size": tp, "pipe_parallel_size": pp}


def _losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "ours/log/metrics.jsonl").read_text().splitlines()]
    return [record["train/lm_loss"] for record in records if "train/lm_loss" in record]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(1, 2, 1), (2, 1, 2), pytest.param((1, 2, 2), marks=pytest.mark.slow)])
def test_the_next_losses_are_gpt_neoxs(tmp_path: Path, layout: tuple[int, int, int]) -> None:
    run_ranks(_go_on, layout[0] * layout[1] * layout[2], _keys(tmp_path, *layout))
    assert _losses(tmp_path) == pytest.approx(LOSSES, abs=2e-6)


@pytest.mark.distributed
def test_moments_of_summed_gradients_show_in_the_losses(tmp_path: Path) -> None:
    """The mutation: DeepSpeed 0.16.5 sums the gradients of micro-batches, and the moments are not corrected."""
    run_ranks(_go_on, 2, _keys(tmp_path, 1, 2, 1), True)
    found = _losses(tmp_path)
    assert found[0] == pytest.approx(LOSSES[0], abs=2e-6)
    assert found[-1] != pytest.approx(LOSSES[-1], abs=2e-5)


@pytest.mark.distributed
def test_a_lost_optimizer_file_is_named(tmp_path: Path) -> None:
    keys = _keys(tmp_path, 1, 2, 1)
    (tmp_path / f"theirs/global_step{SAVED}/zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(RankFailure, match="lacks the optimizer file of dp_rank 0, mp_rank 01: 2 files of each mp_rank"):
        run_ranks(_go_on, 2, keys)


@pytest.mark.unit
def test_the_names_say_the_layout() -> None:
    assert SavedCheckpoint(RECORDED / f"global_step{SAVED}", None).layout == {"tp": 1, "pp": 2, "dp": 2}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("version", "factor"),
    [("0.15.4", 1), ("0.16.0", 8), ("0.16.5+91d1c55", 8), ("0.18.2", 8), ("0.18.3", 1), (None, 1)],
)
def test_which_versions_of_deepspeed_add_gradients_up(version: str | None, factor: int) -> None:
    content = {"ds_version": version, "ds_config": {"gradient_accumulation_steps": 8}}
    assert zero_files._gradient_factor(content) == factor


@pytest.mark.unit
def test_apex_counts_steps_for_a_group() -> None:
    """apex's fused Adam stores the number of steps with the learning rate, not with the moments."""

    def place(value: Any) -> zero_files.StoredTensor:
        return zero_files.StoredTensor(64, 4, value)

    moments = {"exp_avg": "float32", "exp_avg_sq": "float32"}
    content = {
        "optimizer_state_dict": {
            "single_partition_of_fp32_groups": ["float32"],
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [{"step": 7}]},
            "param_slice_mappings": [{"2.norm.scale": {"start": 0, "numel": 4}}],
        }
    }
    assert zero_files.describe(Path("file"), content, place, dict).steps == [7]
    del moments["exp_avg_sq"]
    with pytest.raises(CheckpointError, match="file holds no exp_avg_sq: it was saved before the first step, or by an"):
        zero_files.describe(Path("file"), content, place, dict)
