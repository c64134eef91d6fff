"""Whole runs of the training loop on real files: resume, guard against random weights, agreement with evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case, weights

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=4, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
SPLIT = {"model_parallel_size": 2, "pipe_parallel_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three token files in megatron-core's own format: one to train on, two to validate with."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.RandomState(0)
    prefixes = {}
    for name, documents in (("train", 60), ("domain", 5), ("general", 4)):
        prefix = folder / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(CASE.vocab))
        for _ in range(documents):
            tokens = rng.randint(CASE.vocab, size=rng.randint(5, 60))
            builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        builder.finalize(f"{prefix}.idx")
        prefixes[name] = str(prefix)
    return prefixes


def keys(data: dict[str, str], folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        **SPLIT,
        "train_data_paths": [data["train"]],
        "valid_data_paths": [data["domain"], data["general"]],
        "train_iters": 6,
        "eval_interval": 3,
        "eval_iters": 2,
        "log_interval": 1,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "checkpoint_factor": 2,
        "lr_decay_style": "cosine",
        "warmup": 0.2,
        "checkpoint_activations": True,
        "gradient_accumulation_steps": 4,
        **changes,
    }


def _run(rank: int, world_size: int, run_keys: dict[str, Any]) -> None:
    run_case(CASE, world_size, run_keys)


def _forward_losses(rank: int, world_size: int, run_keys: dict[str, Any]) -> dict[str, float]:
    """Validation losses of a saved checkpoint on any number of ranks."""
    from megatron.checkpoint.load import load_weights
    from megatron.data.build import build_datasets
    from megatron.engine.build import build_inference_engine
    from megatron.evaluation.perplexity import evaluate_all
    from megatron.parallel.process_groups import form_groups

    args = CASE.neox(world_size=world_size, **run_keys)
    engine = build_inference_engine(args, form_groups(args))
    load_weights(engine, args)
    results = evaluate_all(engine, args, build_datasets(args).valid)
    return {name: result.loss for name, result in results.items()}


@pytest.fixture(scope="module")
def whole_run(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted steps from scratch at TP2 x PP2 x DP2, saved every two."""
    folder = tmp_path_factory.mktemp("whole")
    tests = {"test_data_paths": [data["domain"], data["general"]], "test_data_weights": [3.0, 1.0]}
    run_ranks(_run, 8, keys(data, folder, **tests))
    return folder


@pytest.mark.parametrize("how", ["by load", "by the same command"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    data: dict[str, str], whole_run: Path, tmp_path: Path, how: str
) -> None:
    first = keys(data, tmp_path, train_iters=4, lr_decay_iters=6, eval_interval=100)
    run_ranks(_run, 8, first)
    resumed = keys(data, tmp_path, eval_interval=100)
    if how == "by load":
        resumed |= {"load": str(tmp_path / "checkpoints"), "from_scratch": False}
    run_ranks(_run, 8, resumed)
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate", "train/learned_tokens"):
        assert metrics(tmp_path, key) == metrics(whole_run, key), key
    expected = weights(whole_run, 6)
    for name, tensor in weights(tmp_path, 6).items():
        assert torch.equal(tensor, expected[name]), name


def test_validation_reports_each_source(whole_run: Path) -> None:
    for source in ("domain", "general"):
        assert sorted(metrics(whole_run, f"validation/{source}/lm_loss")) == [0, 3, 6]


def test_test_data_are_evaluated_once_at_the_end(whole_run: Path) -> None:
    """They are the validation data here, so the trained model's losses are known; their mean is by weight."""
    losses = {}
    for source in ("domain", "general"):
        losses[source] = metrics(whole_run, f"validation/{source}/lm_loss")[6]
        assert metrics(whole_run, f"test/{source}/lm_loss") == {6: losses[source]}
    mean = (3 * losses["domain"] + losses["general"]) / 4
    assert metrics(whole_run, "test/lm_loss") == {6: pytest.approx(mean, rel=1e-6)}


@pytest.mark.parametrize("split", [(2, 1), (2, 2)], ids=lambda s: "tp{}pp{}".format(*s))
def test_evaluating_the_saved_weights_equals_the_run(
    data: dict[str, str], whole_run: Path, split: tuple[int, int]
) -> None:
    """At another pipeline and data-parallel size: layer files do not depend on them."""
    tp, pp = split
    changes = {"model_parallel_size": tp, "pipe_parallel_size": pp, "from_scratch": False, "save": None}
    run_keys = keys(data, whole_run, load=str(whole_run / "checkpoints"), **changes)
    losses = run_ranks(_forward_losses, tp * pp, run_keys)[0]
    for source in ("domain", "general"):
        assert losses[source] == pytest.approx(metrics(whole_run, f"validation/{source}/lm_loss")[6], rel=1e-6)


def test_a_continued_run_that_knows_nothing_stops(data: dict[str, str], whole_run: Path, tmp_path: Path) -> None:
    """After six steps the model is almost random: continuing from it looks like a broken conversion."""
    continued = keys(data, tmp_path, load=str(whole_run / "checkpoints"), finetune=True, from_scratch=False)
    for code, output in run_ranks(_run, 8, continued, expect_failure=True):
        assert code == 1
        assert "SuspiciousLossError: the first loss of this continued run" in output
    assert not list((tmp_path / "checkpoints").glob("global_step*")), "a broken run must not save"
    run_ranks(_run, 8, continued | {"allow_high_initial_loss": True, "train_iters": 1})


def test_two_pipelines_start_from_the_same_weights(data: dict[str, str], tmp_path: Path) -> None:
    """From scratch, the first loss does not depend on the split."""
    losses = []
    for name, split in (("many", SPLIT), ("one", {"model_parallel_size": 1, "pipe_parallel_size": 1})):
        world_size = 4 if name == "many" else 1
        run_keys = keys(data, tmp_path / name, train_iters=1, save=None, valid_data_paths=None, **split)
        run_ranks(_run, world_size, run_keys)
        losses.append(metrics(tmp_path / name, "train/lm_loss")[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
