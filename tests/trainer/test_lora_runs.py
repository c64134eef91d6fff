"""Whole runs with `lora`: killed during saves, evaluated, and invalid inputs rejected at the start."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron.checkpoint.discovery import find_checkpoint
from megatron.checkpoint.verify import verify_checkpoint
from megatron.common.errors import CheckpointError
from megatron.model.flops import megatron_flops_per_token
from megatron.preflight.run_inputs import input_problems
from tests.support.checkpoint_runs import file_differences
from tests.support.lora import ALPHA, RANK, base_of
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case
from tests.support.token_files import random_documents

if TYPE_CHECKING:
    from megatron.trainer.run import Run

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return base_of(CASE, tmp_path_factory.mktemp("base"))


def keys(data: str, base: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "lora": {"rank": RANK, "alpha": ALPHA, "targets": ["q_proj", "v_proj", "down_proj"]},
        "load": base,
        "from_scratch": False,
        "pipe_parallel_size": 2,
        "train_data_paths": [data],
        "valid_data_paths": [data],
        "eval_interval": 4,
        "eval_iters": 1,
        "log_interval": 1,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "async_save": True,
        "allow_high_initial_loss": True,
        "checkpoint_factor": 2,
        "replica_check_interval": 1,
        "log_param_norm": True,
        "isolate_documents": True,
        "checkpoint_activations": True,
        "train_iters": STEPS,
        "lr_decay_style": "cosine",
        "warmup": 0.1,
        **changes,
    }


def _run(rank: int, world_size: int, run_keys: dict[str, Any], killed_after: int | None = None) -> list[str]:
    from megatron.trainer.run import Run

    class Killed(Run):
        def train_step(self) -> None:
            super().train_step()
            if self.state.iteration == killed_after and os.fork() == 0:
                time.sleep(0.02)
                os.kill(os.getppid(), signal.SIGKILL)
                os._exit(0)

    random.seed(rank)  # a run from scratch has the same random states every time
    np.random.seed(rank)
    run: type[Run] = Run if killed_after is None else Killed
    training = run_case(CASE, world_size, run_keys, run)
    return training.engine.describe()


def test_a_killed_run_continues_as_if_uninterrupted(data: str, base: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    described = run_ranks(_run, 2, keys(data, base, whole))[0]
    (line,) = [line for line in described if line.startswith("lora: ")]
    assert line.startswith("lora: rank 4, scale 2, q_proj, v_proj, down_proj; ")
    outcome = run_ranks(_run, 2, keys(data, base, killed), 5, expect_failure=True)
    assert -signal.SIGKILL in {code for code, _ in outcome}
    assert verify_checkpoint(find_checkpoint(killed / "checkpoints")) == []
    run_ranks(_run, 2, keys(data, base, killed))
    for name in ("train/lm_loss", "train/grad_norm"):
        assert metrics(killed, name) == metrics(whole, name)
    one, other = (folder / f"checkpoints/global_step{STEPS}" for folder in (whole, killed))
    assert file_differences(one, other) == []
    assert (one / "adapter/adapter_model.safetensors").read_bytes() == (
        other / "adapter/adapter_model.safetensors"
    ).read_bytes()
    # Of the model, checkpoints and the log of norms contain only the adapter.
    assert {path.name for path in one.iterdir()} >= {"adapter", "manifest.json", "configs"}
    assert not list(one.glob("layer_*"))
    norms = {name for record in _records(whole) for name in record if name.startswith("parameter_norms/")}
    assert any("q_proj.lora_B" in name for name in norms)
    assert len(metrics(whole, "runtime/tflops_per_rank_megatron")) == STEPS
    # The base has no weight gradients: its weights count 4 FLOPs, as in the metrics, not 6.
    start = json.loads((whole / "log/starts.jsonl").read_text())
    args = CASE.neox(world_size=2, **keys(data, base, whole))
    assert start["flops_per_token"] == megatron_flops_per_token(args.whole_shape, CASE.seq)
    assert start["flops_per_token"] < 0.8 * megatron_flops_per_token(args.shape, CASE.seq)


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]


def _evaluate(rank: int, world_size: int, run_keys: dict[str, Any]) -> float:
    from megatron.checkpoint.load import load_weights
    from megatron.engine.build import build_inference_engine
    from megatron.parallel.process_groups import form_groups
    from tests.support.engine_runs import batch_of, make_samples

    args = CASE.neox(world_size=world_size, **run_keys)
    engine = build_inference_engine(args, form_groups(args))
    load_weights(engine, args)
    return engine.evaluate(batch_of(engine, args, make_samples(CASE, 4)))


def test_an_adapter_is_evaluated_only_with_its_base(data: str, base: str, tmp_path: Path) -> None:
    run_ranks(_run, 2, keys(data, base, tmp_path, train_iters=2, async_save=False))
    folder = tmp_path / "checkpoints"
    given = {"load": base, "from_scratch": False, "gradient_accumulation_steps": 1}
    without = run_ranks(_evaluate, 1, given)[0]
    with_it = {
        run_ranks(_evaluate, tp * pp, given | {"lora": {"load": str(path)}, **split})[0]
        for path in (folder, folder / "global_step2/adapter")
        for tp, pp, split in ((1, 1, {}), (2, 1, {"model_parallel_size": 2}))
    }
    assert max(with_it) == pytest.approx(min(with_it), abs=1e-6)
    assert abs(max(with_it) - without) > 1e-5
    (refused,) = input_problems(CASE.neox(**given | {"load": str(folder), "train_data_paths": [data]}))
    assert "holds an adapter and no model: give its base, load: " in refused


def test_contradictory_inputs_are_found_before_the_start(data: str, base: str, tmp_path: Path) -> None:
    run_ranks(_run, 2, keys(data, base, tmp_path, train_iters=2))
    again = keys(data, base, tmp_path)
    assert input_problems(CASE.neox(**again, world_size=2)) == []
    other = again | {"lora": {"rank": RANK, "alpha": 99, "targets": ["q_proj", "v_proj", "down_proj"]}}
    (problem,) = input_problems(CASE.neox(**other, world_size=2))
    assert "holds a different adapter from the one in the configuration: lora.alpha: 8.0 in it, 99.0 here" in problem
    full = {key: value for key, value in again.items() if key != "lora"}
    (problem,) = input_problems(CASE.neox(**full, world_size=2))
    assert "holds an adapter and no model" in problem
    there = again | {"save": base, "load": str(tmp_path / "elsewhere")}
    (problem,) = input_problems(CASE.neox(**there, world_size=2))
    assert "holds a whole model: its run trains all weights" in problem


def _damage(rank: int, world_size: int, run_keys: dict[str, Any]) -> str:
    try:
        _run(rank, world_size, run_keys)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_damaged_adapter_is_named(data: str, base: str, tmp_path: Path) -> None:
    run_ranks(_run, 2, keys(data, base, tmp_path, train_iters=2))
    path = tmp_path / "checkpoints/global_step2/adapter/adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 0x10
    path.write_bytes(raw)
    assert load_file(path)  # still a file that opens
    assert [problem for problem in verify_checkpoint(path.parent.parent) if "adapter_model.safetensors" in problem]
    messages = run_ranks(_damage, 2, keys(data, base, tmp_path))
    assert len(set(messages)) == 1
    assert "adapter_model.safetensors is damaged: the bytes of base_model" in messages[0]


def test_going_back_and_what_the_message_advises(data: str, base: str, tmp_path: Path) -> None:
    """`load` names the base, so a step of the run itself is requested with `save`."""
    run_ranks(_run, 2, keys(data, base, tmp_path, train_iters=4))
    (tmp_path / "checkpoints/global_step4/adapter/adapter_config.json").unlink()
    given = keys(data, base, tmp_path, train_iters=4)
    (problem,) = input_problems(CASE.neox(**given, world_size=2))
    advised = re.search(r"choose one with --save (\S+) --iteration (\d+)\)", problem)
    assert advised, problem
    run_ranks(_run, 2, given | {"save": advised[1], "iteration": int(advised[2])})
    assert verify_checkpoint(find_checkpoint(tmp_path / "checkpoints")) == []
