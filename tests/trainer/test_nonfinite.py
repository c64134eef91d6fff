"""Non-finite steps and skipped samples: the rest equals a run without them, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint.manifest import read_manifest
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case, weights
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=4, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
SPLIT = {"model_parallel_size": 2, "pipe_parallel_size": 2}
BATCH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def keys(data: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        **SPLIT,
        "train_data_paths": [data],
        "train_iters": 5,
        "log_interval": 1,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "extra_save_iters": [changes.get("train_iters", 5)],
        "gradient_accumulation_steps": 2,
        **changes,
    }


def _run(rank: int, world_size: int, run_keys: dict[str, Any], poison: dict[str, Any]) -> None:
    """A run in which the `poison`ed rank's gradients or losses are spoiled in some iterations."""
    from megatron.model.loss import GlobalMeanLoss
    from megatron.trainer.run import Run

    class Poisoned(Run):
        def now(self) -> bool:
            return self.state.iteration + 1 in poison["iterations"]

        def set_up(self) -> None:
            super().set_up()
            if rank != poison.get("rank"):
                return
            if poison["where"] == "gradient":
                named = (pair for _, layer in self.engine.numbered_layers() for pair in layer.named_parameters())
                next(p for name, p in named if poison["tensor"] in name).register_hook(self.spoiled)
            else:  # the loss alone: its gradient stays finite
                token_losses = GlobalMeanLoss.token_losses

                def overflowing(loss: GlobalMeanLoss, *arguments: torch.Tensor, **keywords: Any) -> torch.Tensor:
                    return token_losses(loss, *arguments, **keywords) + (poison["value"] if self.now() else 0.0)

                GlobalMeanLoss.token_losses = overflowing  # type: ignore[method-assign]

        def spoiled(self, gradient: torch.Tensor) -> torch.Tensor:
            if self.now():
                gradient = gradient.clone()
                gradient.view(-1)[0] = poison["value"]
            return gradient

    run_case(CASE, world_size, run_keys, Poisoned)


def everything(folder: Path, step: int) -> dict[str, Any]:
    """Weights, and the masters, moments and step counts of every range of every rank."""
    found: dict[str, Any] = dict(weights(folder, step))
    checkpoint = folder / f"checkpoints/global_step{step}"
    for name, entry in read_manifest(checkpoint).files.items():
        if entry.ranges:
            tensors = load_file(checkpoint / name)
            found |= {f"{name}.{key}": tensor for key, tensor in tensors.items() if key != "random_state"}
            found |= {f"{name}.{part.where}.step": part.step for part in entry.ranges}
    assert any("step" in name for name in found), sorted(found)[:50]
    assert any("exp_avg_sq" in name for name in found)
    return found


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    different = [
        name
        for name, value in left.items()
        if not (torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name])
    ]
    assert different == []


POISONS = [
    pytest.param({"rank": 3, "where": "gradient", "tensor": "norm", "value": math.nan}, id="NaN in a norm of one rank"),
    pytest.param({"rank": 5, "where": "gradient", "tensor": "weight", "value": math.inf}, id="infinity in a matrix"),
    pytest.param({"rank": 6, "where": "loss", "value": math.inf}, id="a loss with finite gradients"),
]


@pytest.fixture(scope="module", params=[pytest.param("fp32", marks=pytest.mark.slow), "bfloat16"])
def without(data: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """(precision, folder) of a run of 4 steps whose data lack the samples of the third of 5."""
    folder = tmp_path_factory.mktemp("without")
    ranges = [[2 * BATCH, 3 * BATCH]]
    run_ranks(_run, 8, keys(data, folder, precision=request.param, train_iters=4, skip_sample_ranges=ranges), {})
    return request.param, folder


@pytest.mark.parametrize("poison", POISONS)
def test_a_skipped_step_leaves_no_trace(
    data: str, tmp_path: Path, without: tuple[str, Path], poison: dict[str, Any]
) -> None:
    """Skipping step 3 of 5 equals the run of 4 steps whose data lack that step's samples."""
    precision, expected_folder = without
    run_ranks(_run, 8, keys(data, tmp_path, precision=precision), {**poison, "iterations": [3]})
    assert_same(everything(tmp_path, 5), everything(expected_folder, 4))
    losses, expected = (metrics(folder, "train/lm_loss") for folder in (tmp_path, expected_folder))
    assert [losses[i] for i in (1, 2, 4, 5)] == [expected[i] for i in (1, 2, 3, 4)]
    for folder, iterations in ((tmp_path, 5), (expected_folder, 4)):
        assert metrics(folder, "train/consumed_samples")[iterations] == 5 * BATCH


def _quiet(rank: int, world_size: int, run_keys: dict[str, Any], poison: dict[str, Any]) -> str:
    """`_run`, but returns the message of the error that ended it."""
    from megatron.engine.nonfinite import SkipLimitError

    try:
        _run(rank, world_size, run_keys, poison)
    except SkipLimitError as error:
        return str(error)
    return ""


def test_too_many_skips_stop_on_all_ranks(data: str, tmp_path: Path) -> None:
    """At most two in a row and three in all; the counts continue after a resume."""
    poison = {"rank": 5, "where": "gradient", "tensor": "weight", "value": math.nan}
    bounds = {"max_skipped_steps_in_a_row": 2, "max_skipped_steps": 3}
    row = keys(data, tmp_path / "row", train_iters=6, **bounds)
    said = run_ranks(_quiet, 8, row, poison | {"iterations": [1, 3, 4, 5]})
    assert len(set(said)) == 1
    assert "iteration 5: loss" in said[0]
    assert "its samples are [32, 40)" in said[0]
    assert "in a row: 3 (at most 2, max_skipped_steps_in_a_row), in total: 4 (at most 3, max_skipped_steps)" in said[0]
    assert "every replica's loss is finite: it arose in the backward pass" in said[0]
    assert not list((tmp_path / "row/checkpoints").glob("global_step*"))

    first = keys(data, tmp_path / "all", train_iters=4, lr_decay_iters=9, **bounds)
    assert set(run_ranks(_quiet, 8, first, poison | {"iterations": [1, 3, 4]})) == {""}
    second = keys(data, tmp_path / "all", train_iters=9, **bounds)
    said = run_ranks(_quiet, 8, second, poison | {"iterations": [5]})
    assert "in a row: 3 (at most 2" in said[0]
    assert "in total: 4 (at most 3, max_skipped_steps)" in said[0]


def _mutant(rank: int, world_size: int, run_keys: dict[str, Any], poison: dict[str, Any], mutation: str) -> str:
    """`_run` without one of the two safeguards that make every rank skip a step; returns the error's text."""
    from megatron.engine import deepspeed, deepspeed_module
    from megatron.engine.nonfinite import SuspiciousLossError

    if mutation == "no propagation":
        deepspeed.propagate = lambda replicated, sharded: None  # type: ignore[assignment]
    else:
        deepspeed_module.poisoned = lambda loss: loss  # type: ignore[assignment]
    try:
        _run(rank, world_size, run_keys, poison)
    except SuspiciousLossError as error:
        return str(error)
    return ""


def test_without_propagation_a_nan_would_be_applied(data: str, tmp_path: Path) -> None:
    """A NaN in the second tensor-parallel rank's copy of a norm: DeepSpeed's norm does not see it."""
    poison = {"rank": 1, "where": "gradient", "tensor": "norm", "value": math.nan, "iterations": [2]}
    for name, run, arguments in (("with", _run, ()), ("without", _mutant, ("no propagation",))):
        changes = {"pipe_parallel_size": 1, "train_iters": 2, "replica_check_interval": 0}
        run_ranks(run, 2, keys(data, tmp_path / name, **changes), poison, *arguments)
        assert metrics(tmp_path / name, "train/skipped_steps")[2] == (1 if name == "with" else 0)


def test_without_poison_an_infinite_loss_would_be_applied(data: str, tmp_path: Path) -> None:
    poison = {"rank": 0, "where": "loss", "value": math.inf, "iterations": [2]}
    one = {"pipe_parallel_size": 1, "model_parallel_size": 1}
    said = run_ranks(_mutant, 1, keys(data, tmp_path, **one), poison, "no poison")
    assert said[0].startswith("iteration 2: loss inf, gradient norm 1.1"), "the engine has applied it; the run stops"


def _replica_with_a_broken_loss(rank: int, world_size: int, run_keys: dict[str, Any]) -> str:
    return _quiet(rank, world_size, run_keys, {"rank": 6, "where": "loss", "value": math.inf, "iterations": [1]})


def test_the_replica_whose_loss_is_broken_is_named(data: str, tmp_path: Path) -> None:
    run_keys = keys(data, tmp_path, max_skipped_steps_in_a_row=0)
    said = run_ranks(_replica_with_a_broken_loss, 8, run_keys)
    assert "not finite in replica 1 of 2 data-parallel replicas" in said[0]


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (1, 1)], ids=lambda s: "tp{}pp{}".format(*s))
def test_skipped_samples_are_skipped_on_every_layout(data: str, tmp_path: Path, layout: tuple[int, int]) -> None:
    """Losses equal those of a run at DP2 with another micro-batch; the ranges cut through global batches."""
    ranges = [[3, 9], [20, 21], [18, 21]]
    losses = {}
    for name, split, changes in (
        ("dp", (1, 1), {"gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 1}),
        ("other", layout, {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 4}),
    ):
        sizes = dict(zip(SPLIT, split, strict=True))
        world = split[0] * split[1] * (2 if name == "dp" else 1)
        run_keys = keys(data, tmp_path / name, skip_sample_ranges=ranges, save=None, **changes) | sizes
        run_ranks(_run, world, run_keys, {})
        losses[name] = metrics(tmp_path / name, "train/lm_loss")
        assert metrics(tmp_path / name, "train/consumed_samples") == {1: 14, 2: 25, 3: 33, 4: 41, 5: 49}
    for iteration, loss in losses["dp"].items():
        assert losses["other"][iteration] == pytest.approx(loss, rel=1e-6)


def test_ranges_given_on_resume_change_the_future_alone(data: str, tmp_path: Path) -> None:
    first = keys(data, tmp_path, train_iters=2, lr_decay_iters=5, skip_sample_ranges=[[4, 12]])
    run_ranks(_run, 8, first, {})
    assert metrics(tmp_path, "train/consumed_samples") == {1: 16, 2: 24}
    resumed = keys(data, tmp_path, skip_sample_ranges=[[0, 2], [30, 33]])  # without the old range: 8 samples more
    run_ranks(_run, 8, resumed, {})
    assert metrics(tmp_path, "train/consumed_samples") == {1: 16, 2: 24, 3: 35, 4: 43, 5: 51}
    whole = keys(data, tmp_path / "whole", skip_sample_ranges=[[4, 12], [30, 33]])
    run_ranks(_run, 8, whole, {})
    assert metrics(tmp_path, "train/lm_loss") == metrics(tmp_path / "whole", "train/lm_loss")
