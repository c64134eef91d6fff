"""Warm-up, stable phase, cooldown: a branch from a checkpoint of the stable phase equals the straight run.

It has the same bits at the same layout and the same samples at another one. A phase with another data mix keeps its
shares, also if it is resumed on other ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.data.build import build_datasets
from megatron.trainer.schedule import Schedule
from tests.support.models import Case
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case, weights

pytestmark = pytest.mark.distributed

CASE = Case(heads=2, kv_heads=2, head_dim=8, layers=2, intermediate=24, vocab=64, seq=16)
TENSOR, DATA = {"model_parallel_size": 2}, {"model_parallel_size": 1}
BATCH = {"train_batch_size": 4, "gradient_accumulation_steps": None}  # 2 x 2 micro-batches, or 2 replicas x 1
SAMPLES = ("train/lm_loss", "train/grad_norm", "train/learning_rate")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two token files; ids in `low` are below 32, ids in `high` are not."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.RandomState(0)
    for name, first in (("low", 0), ("high", 32)):
        builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=DType.optimal_dtype(CASE.vocab))
        for _ in range(40):
            tokens = first + rng.randint(32, size=rng.randint(5, 60))
            builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        builder.finalize(f"{folder / name}.idx")
    return {name: str(folder / name) for name in ("low", "high")}


def keys(data: dict[str, str], folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        **BATCH,
        **TENSOR,
        "train_data_paths": [data["low"], data["high"]],
        "train_data_weights": [0.75, 0.25],
        "train_iters": 8,
        "lr_decay_style": "wsd",
        "warmup": None,
        "lr_warmup_iters": 2,
        "lr_wsd_decay_iters": 0,
        "min_lr": 1e-5,
        "lr_overrides": [{"at": 5, "scale": 0.5}],
        "log_interval": 1,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "checkpoint_factor": 4,
        **changes,
    }


def branched(data: dict[str, str], trunk: Path, folder: Path, iteration: int, **changes: Any) -> dict[str, Any]:
    start = {"load": str(trunk / "checkpoints"), "iteration": iteration, "from_scratch": False}
    return keys(data, folder, **start, **changes)


def _run_each(rank: int, world_size: int, runs: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Train the runs one after the other; returns the samples [first, end) that each read."""
    from megatron.core import parallel_state

    ended = []
    for run_keys in runs:
        ended.append(run_case(CASE, world_size, run_keys))
        parallel_state.destroy_model_parallel()
    return [(run.first * run.args.train_batch_size, run.state.consumed_samples) for run in ended]


@pytest.fixture(scope="module")
def runs(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Straight runs with a cooldown, and a trunk with branches of the same lengths, one of them resumed; TP2."""
    names = ("straight", "trunk", "early", "late", "rewarmed", "short")
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    trunk = folders["trunk"]
    cooldown = {"lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "cosine"}
    again = {"train_iters": 11, "lr_wsd_decay_iters": 1, "lr_warmup_iters": 2, "lr_restart_iter": 8}
    given = [
        keys(data, folders["straight"], **cooldown),
        keys(data, folders["short"], train_iters=7, lr_wsd_decay_iters=2, extra_save_iters=[7]),
        keys(data, trunk, train_iters=20, exit_interval=8),
        branched(data, trunk, folders["early"], 4, **cooldown, exit_interval=6),
        keys(data, folders["early"], **cooldown),  # continues from its own iteration 6
        branched(data, trunk, folders["late"], 4, train_iters=7, lr_wsd_decay_iters=2),
        branched(data, folders["straight"], folders["rewarmed"], 8, **again),
    ]
    run_ranks(_run_each, 2, given)
    return folders


@pytest.mark.parametrize(("branch", "straight", "end"), [("early", "straight", 8), ("late", "short", 7)])
def test_a_branch_equals_the_straight_run(runs: dict[str, Path], branch: str, straight: str, end: int) -> None:
    for key in SAMPLES:
        one, other = metrics(runs[branch], key), metrics(runs[straight], key)
        assert sorted(one) == list(range(5, end + 1))
        assert one == {iteration: other[iteration] for iteration in one}, key
    expected = weights(runs[straight], end)
    for name, tensor in weights(runs[branch], end).items():
        assert torch.equal(tensor, expected[name]), name
    rates = metrics(runs[straight], "train/learning_rate")
    assert rates[end] < rates[4] / 2, "and the cooldown takes part"


def test_a_trunk_with_a_warmup_by_share_is_another_run(runs: dict[str, Path]) -> None:
    """Branches equal straight runs only because their warm-up does not depend on the length of the run."""
    trunk, straight = (metrics(runs[name], "train/learning_rate") for name in ("trunk", "straight"))
    assert [trunk[n] for n in range(1, 5)] == [straight[n] for n in range(1, 5)]
    by_share = {"lr_warmup_iters": None, "warmup": 0.25, "lr_wsd_decay_iters": 0, "lr_decay_style": "wsd"}
    args = [CASE.neox(world_size=1, train_iters=n, **by_share) for n in (8, 20)]
    rates = [[Schedule(one, one.train_iters).learning_rate(n) for n in range(4)] for one in args]
    assert rates[0] != rates[1]


def test_a_continued_run_warms_up_again(runs: dict[str, Path]) -> None:
    rates = metrics(runs["rewarmed"], "train/learning_rate")
    # The override of iteration 5 still applies. The rate rises from the floor, not from zero, and falls again.
    expected = {9: (1e-5 + 0.5 * (1e-3 - 1e-5)) / 2, 10: (1e-5 + 0.5 * (1e-3 - 1e-5)) / 2, 11: 1e-3 / 2}
    assert rates == pytest.approx(expected)


def test_each_start_is_recorded(runs: dict[str, Path]) -> None:
    """tools/report reads where a run began, at which layout, and what it reads from there to its end."""
    path = runs["early"] / "log/starts.jsonl"
    branch, resumed = (json.loads(line) for line in path.read_text().splitlines())
    assert (branch["iteration"], resumed["iteration"], resumed["train_iters"]) == (4, 6, 8)
    assert branch["from"] == str(runs["trunk"] / "checkpoints/global_step4")
    assert resumed["from"] == str(runs["early"] / "checkpoints/global_step6")
    assert branch["layout"] == {"tp": 2, "pp": 1, "dp": 1}
    assert branch["lr_overrides"] == [{"at": 5, "scale": 0.5}]
    low, high = (one["samples"] for one in branch["data"])
    assert (low, high) == (12, 4)
    assert sum(one["samples"] for one in resumed["data"]) == 8


@pytest.mark.slow
def test_a_stage_of_another_mix_keeps_its_shares_on_other_ranks(
    data: dict[str, str], runs: dict[str, Path], tmp_path: Path
) -> None:
    """The cooldown reads three quarters of the other source; it is stopped halfway and resumes at TP1 x DP2."""
    mix = {"train_data_weights": [0.25, 0.75], "train_iters": 24, "lr_wsd_decay_iters": 20}
    whole = branched(data, runs["trunk"], tmp_path / "whole", 4, **mix)
    first = branched(data, runs["trunk"], tmp_path / "halves", 4, **mix, exit_interval=12)
    read = run_ranks(_run_each, 2, [whole, first])[0]
    read += run_ranks(_run_each, 2, [keys(data, tmp_path / "halves", **mix, **DATA)])[0]
    assert read == [(16, 96), (16, 48), (48, 96)]
    order = build_datasets(CASE.neox(world_size=2, **whole), iteration=4, consumed_samples=16).train.mixture.source_of
    assert sum(order[16:96]) / 80 == pytest.approx(0.75, abs=0.02)
    for key in SAMPLES:
        halves = metrics(tmp_path / "halves", key)
        assert sorted(halves) == list(range(5, 25))
        assert halves == pytest.approx(metrics(tmp_path / "whole", key), rel=1e-5), key
