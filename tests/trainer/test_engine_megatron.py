"""Whole runs under engine: megatron with virtual stages report, save and resume like DeepSpeed's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.verify import verify_checkpoint
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case, weights
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=4, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
VIRTUAL = {"engine": "megatron", "virtual_pipe_parallel_size": 2}
REPORTED = ("train/lm_loss", "train/grad_norm", "train/learned_tokens", "train/learning_rate")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def keys(data: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "pipe_parallel_size": 2,
        "train_data_paths": [data],
        "valid_data_paths": [data],
        "train_iters": 4,
        "lr_decay_iters": 4,
        "lr_decay_style": "cosine",
        "eval_interval": 2,
        "eval_iters": 3,
        "gradient_accumulation_steps": 2,
        "isolate_documents": True,
        "replica_check_interval": 1,
        "skip_sample_ranges": [[5, 7]],
        "log_interval": 1,
        "log_param_norm": True,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "checkpoint_factor": 2,
        "async_save": True,
        "profile": True,
        "profile_step_start": 2,
        "profile_step_stop": 3,
        **changes,
    }


def _run(rank: int, world_size: int, run_keys: dict[str, Any]) -> None:
    run_case(CASE, world_size, run_keys)


def test_a_whole_run_equals_deepspeed_and_resumes_bit_exactly(data: str, tmp_path: Path) -> None:
    """With evaluation, replica checks, a profile and saves between steps, all of which read weights during the run."""
    theirs, whole, half = (tmp_path / name for name in ("deepspeed", "whole", "half"))
    run_ranks(_run, 4, keys(data, theirs, save=None, checkpoint_factor=None))
    run_ranks(_run, 4, keys(data, whole, **VIRTUAL))
    norms = [key for key in _reported(whole) if key.startswith("parameter_norms/")]
    assert len(norms) == 6 * CASE.layers + 3
    for key in (*REPORTED, f"validation/{Path(data).name}/lm_loss", *norms):
        found, expected = metrics(whole, key), metrics(theirs, key)
        assert len(found) >= 3
        assert found == pytest.approx(expected, rel=1e-6), key
    timers = metrics(whole, "timers/backward")
    assert timers
    assert min(timers.values()) > 0
    assert verify_checkpoint(whole / "checkpoints/global_step4") == []
    assert list((whole / "log").rglob("iterations_2-2_rank_0.json"))

    run_ranks(_run, 4, keys(data, half, **VIRTUAL, train_iters=2))
    run_ranks(_run, 4, keys(data, half, **VIRTUAL))
    for key in REPORTED:
        assert metrics(half, key) == metrics(whole, key), key
    expected_weights = weights(whole, 4)
    for name, tensor in weights(half, 4).items():
        assert torch.equal(tensor, expected_weights[name]), name


def _reported(folder: Path) -> set[str]:
    records = [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]
    return {key for record in records for key in record}
