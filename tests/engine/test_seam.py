"""A run, its checkpoints, evaluation and generation on a fake engine: the engine protocol is sufficient."""

from __future__ import annotations

import math
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

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
TIED = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, tied=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def keys(data: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "train_data_paths": [data],
        "valid_data_paths": [data],
        "train_iters": 6,
        "eval_interval": 3,
        "eval_iters": 1,
        "log_interval": 1,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "checkpoint_factor": 3,
        "replica_check_interval": 2,
        "lr_decay_style": "cosine",
        "warmup": 0.2,
        "isolate_documents": True,
        **changes,
    }


def _run(rank: int, world_size: int, case: Case, run_keys: dict[str, Any], fake: bool, broken_step: int = 0) -> None:
    from megatron.trainer import run
    from tests.support.fake_engine import FakeEngine

    if fake:
        run.build_engine = FakeEngine  # type: ignore[assignment, misc]

    class Broken(run.Run):
        def train_step(self) -> None:
            if self.state.iteration + 1 == broken_step:
                _, layer = next(self.engine.numbered_layers())
                parameter = next(layer.parameters())
                handle = parameter.register_hook(lambda gradient: gradient * math.nan)
                super().train_step()
                handle.remove()
            else:
                super().train_step()

    run_case(case, world_size, run_keys, Broken)


@pytest.mark.parametrize("case", [pytest.param(CASE, id="untied"), pytest.param(TIED, id="tied")])
def test_a_run_on_the_fake_engine_equals_one_on_deepspeed(data: str, tmp_path: Path, case: Case) -> None:
    """Losses, norms, validation losses and weights are equal; both engines skip one non-finite step."""
    for name, fake in (("fake", True), ("deepspeed", False)):
        run_ranks(_run, 1, case, keys(data, tmp_path / name), fake, 2)
    for key in ("train/lm_loss", "train/grad_norm", "train/skipped_steps", "train/consumed_samples"):
        found, expected = (metrics(tmp_path / name, key) for name in ("fake", "deepspeed"))
        assert found == pytest.approx(expected, rel=1e-6), key
    source = Path(data).name
    found, expected = (metrics(tmp_path / name, f"validation/{source}/lm_loss") for name in ("fake", "deepspeed"))
    assert sorted(found) == [0, 3, 6]
    assert found == pytest.approx(expected, rel=1e-6)
    assert metrics(tmp_path / "fake", "train/skipped_steps")[6] == 1
    theirs = weights(tmp_path / "deepspeed", 6)
    for name, tensor in weights(tmp_path / "fake", 6).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_saving_and_resuming_keeps_every_bit(data: str, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_ranks(_run, 1, CASE, keys(data, whole), True)
    run_ranks(_run, 1, CASE, keys(data, halves, train_iters=3, lr_decay_iters=6), True)
    assert verify_checkpoint(halves / "checkpoints/global_step3") == []
    run_ranks(_run, 1, CASE, keys(data, halves), True)
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate"):
        assert metrics(halves, key) == metrics(whole, key)
    expected = weights(whole, 6)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(halves, 6).items())


def test_a_deepspeed_checkpoint_continues_on_another_engine(data: str, tmp_path: Path) -> None:
    """And back: masters, moments and step counts are in engine-independent files."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_ranks(_run, 1, CASE, keys(data, whole, replica_check_interval=None), False)
    split = {"model_parallel_size": 2, "replica_check_interval": None}
    run_ranks(_run, 2, CASE, keys(data, halves, train_iters=2, lr_decay_iters=6, checkpoint_factor=2, **split), False)
    run_ranks(_run, 1, CASE, keys(data, halves, train_iters=4, lr_decay_iters=6, checkpoint_factor=2), True)
    run_ranks(_run, 2, CASE, keys(data, halves, checkpoint_factor=2, **split), False)
    for key in ("train/lm_loss", "train/grad_norm"):
        found, expected = metrics(halves, key), metrics(whole, key)
        assert sorted(found) == [1, 2, 3, 4, 5, 6]
        assert found == pytest.approx(expected, rel=1e-6), key


def recomputed(engine: Any, prompt: list[int], new: int) -> list[int]:
    """Greedy generation without a cache."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(engine.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def _loss_and_text(rank: int, world_size: int, run_keys: dict[str, Any]) -> tuple[float, list[int]]:
    from megatron.checkpoint.load import load_weights
    from megatron.data.build import build_datasets
    from megatron.evaluation.perplexity import evaluate
    from megatron.parallel.process_groups import form_groups
    from tests.support.fake_engine import FakeEngine
    from tests.support.generation_runs import continued, sequences

    args = CASE.neox(world_size=world_size, maximum_tokens=5, **run_keys)
    engine = FakeEngine(args, form_groups(args))
    load_weights(engine, args)
    (source,) = build_datasets(args).valid.values()
    (text,) = continued(engine, args, sequences([[3, 4]], args.maximum_tokens))
    assert text == recomputed(engine, [3, 4], args.maximum_tokens)
    return evaluate(engine, args, source, args.train_batch_size).loss, text


def test_evaluation_and_generation_read_its_checkpoints(data: str, tmp_path: Path) -> None:
    run_ranks(_run, 1, CASE, keys(data, tmp_path), True)
    loaded = keys(data, tmp_path, load=str(tmp_path / "checkpoints"), save=None, from_scratch=False)
    loss, text = run_ranks(_loss_and_text, 1, loaded)[0]
    assert loss == pytest.approx(metrics(tmp_path, f"validation/{Path(data).name}/lm_loss")[6], rel=1e-6)
    assert len(text) == 5
