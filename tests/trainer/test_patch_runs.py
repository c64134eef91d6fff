"""Whole runs on images: resumed bit for bit, guarded against random weights, and able to overfit a few images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.made_images import blobs, import_archive
from tests.support.patch_models import PatchCase
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case, weights

pytestmark = pytest.mark.distributed

CASE = PatchCase(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, seq=16, normalise="none")
SPLIT = {"model_parallel_size": 2, "pipe_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("images")
    return {
        "train": import_archive(folder, "train", blobs(40, 16)),
        "valid": import_archive(folder, "valid", blobs(6, 16, seed=1)),
    }


def keys(data: dict[str, str], folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        **SPLIT,
        "train_data_paths": [data["train"]],
        "valid_data_paths": [data["valid"]],
        "train_iters": 6,
        "eval_interval": 3,
        "eval_iters": 1,
        "log_interval": 1,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "checkpoint_factor": 3,
        "lr_decay_style": "cosine",
        "checkpoint_activations": True,
        "gradient_accumulation_steps": 4,
        **changes,
    }


def _run(rank: int, world_size: int, run_keys: dict[str, Any]) -> None:
    run_case(CASE, world_size, run_keys)


def test_a_resumed_run_equals_the_uninterrupted_one(data: dict[str, str], tmp_path: Path) -> None:
    """At TP2 x PP2 with sequence parallelism; the last of 16 patches is read but predicts nothing."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(_run, 4, keys(data, whole))
    run_ranks(_run, 4, keys(data, parts, train_iters=3, lr_decay_iters=6))
    run_ranks(_run, 4, keys(data, parts))
    for key in ("train/huber_loss", "train/grad_norm", "train/learned_tokens"):
        assert metrics(parts, key) == metrics(whole, key), key
    assert metrics(whole, "train/learned_tokens")[1] == 8 * 15
    assert sorted(metrics(whole, "validation/huber_loss")) == [0, 3, 6]
    assert not metrics(whole, "validation/huber_loss_ppl")
    expected = weights(whole, 6)
    for name, tensor in weights(parts, 6).items():
        assert torch.equal(tensor, expected[name]), name


ALONE = {"model_parallel_size": 1, "pipe_parallel_size": 1, "sequence_parallel": False, "valid_data_paths": None}


def test_a_continued_run_that_knows_nothing_stops(data: dict[str, str], tmp_path: Path) -> None:
    """After a step with a tiny rate a model is still random, as after a broken conversion; a trained one continues."""
    for name, rate in (("random", 1e-9), ("learned", 3e-3)):
        folder = tmp_path / name
        optimizer = {"type": "Adam", "params": {"lr": rate}}
        run_ranks(_run, 1, keys(data, folder, optimizer=optimizer, **ALONE))
        continued = {"load": str(folder / "checkpoints"), "finetune": True, "from_scratch": False, "save": None}
        ((code, output),) = run_ranks(_run, 1, keys(data, tmp_path, **ALONE | continued), expect_failure=True)
        if name == "random":
            assert code == 1
            assert "an untrained model has the mean Huber loss" in output
        else:
            assert code == 0, output


def _blank_run(rank: int, world_size: int, run_keys: dict[str, Any]) -> None:
    run_case(replace(CASE, normalise="patch"), world_size, run_keys)


def test_a_batch_of_blank_images_is_refused(data: dict[str, str], tmp_path: Path) -> None:
    blank = import_archive(tmp_path, "blank", np.full((8, 16, 16, 3), 7, np.uint8))
    keys_of_run = keys(data, tmp_path, **ALONE | {"train_data_paths": [blank], "save": None})
    ((code, output),) = run_ranks(_blank_run, 1, keys_of_run, expect_failure=True)
    assert code == 1
    assert "training step 1: no token of the global batch has a target" in output
    assert "every patch is blank" in output


def test_eight_images_are_learned_by_heart(data: dict[str, str], tmp_path: Path) -> None:
    eight = import_archive(tmp_path, "eight", blobs(8, 16, seed=2))
    changes = {
        **ALONE,
        "train_data_paths": [eight],
        "save": None,
        "train_iters": 150,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "checkpoint_activations": False,
        "weight_decay": 0.0,
        "optimizer": {"type": "Adam", "params": {"lr": 5e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    }
    run_ranks(_run, 1, keys(data, tmp_path, **changes))
    losses = metrics(tmp_path, "train/huber_loss")
    assert losses[150] < 0.1 * losses[1]
