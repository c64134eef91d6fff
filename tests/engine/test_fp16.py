"""fp16 with dynamic loss scaling equals a plain loop with torch's scaler, also in skipped steps; and it resumes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fp16 import allow_fp16, plain_loop
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case, weights
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
STEPS, WINDOW, POWER, LR = 12, 4, 22, 1e-2
SCALING = {"enabled": True, "initial_scale_power": POWER, "loss_scale_window": WINDOW, "hysteresis": 1}
FP16: dict[str, Any] = {"precision": "fp16", "fp16": SCALING, "gradient_accumulation_steps": 1}


def _steps(rank: int, world_size: int, split: dict[str, Any]) -> Any:
    """(loss, scale x replicas, applied, overflow) of every step on the same batches, counters, and weights."""
    from tests.support.engine_runs import batch_of, build, make_samples, rank_parameters

    allow_fp16()
    data = world_size // (split.get("model_parallel_size", 1) * split.get("pipe_parallel_size", 1))
    # A replica's part of the global mean is first multiplied by the number of replicas, which uses up fp16 range.
    scaling = SCALING | {"initial_scale_power": POWER - data.bit_length() + 1}
    keys = FP16 | {"fp16": scaling, "train_micro_batch_size_per_gpu": 4 // data}
    args = CASE.neox(world_size=world_size, **split, **keys)
    engine = build(args, CASE)
    samples = make_samples(CASE, 4)
    records = []
    for _ in range(STEPS):
        engine.set_learning_rate(LR)
        result = engine.train_step(batch_of(engine, args, samples))
        records.append((result.loss, result.loss_scale * data, result.applied, result.overflow))
    return records, engine.counters, rank_parameters(engine), args


def run(ranks: int, **split: Any) -> tuple[list[Any], Any, dict[str, torch.Tensor]]:
    """The history common to all ranks, the counters, and the weights after the last step."""
    from tests.support.engine_runs import whole_model

    results = run_ranks(_steps, ranks, split)
    assert all(result[0] == results[0][0] for result in results)
    return results[0][0], results[0][1], whole_model([result[2] for result in results], results[0][3])


def _plain() -> tuple[list[tuple[float, float, bool]], dict[str, torch.Tensor]]:
    from tests.support.engine_runs import make_samples, stack

    return plain_loop(CASE, [stack(make_samples(CASE, 4))] * STEPS, 2.0**POWER, WINDOW + 1, LR, clip=1.0)


@pytest.fixture(scope="module")
def plain() -> tuple[list[tuple[float, float, bool]], dict[str, torch.Tensor]]:
    return _plain()


def distance(ours: dict[str, torch.Tensor], masters: dict[str, torch.Tensor]) -> float:
    """Distance of all weights from those of the plain loop, relative to how far it moved them."""
    start = {name: p.detach() for name, p in CASE.hugging_face().named_parameters()}
    far = sum(float((ours[name].double() - masters[name].double()).square().sum()) for name in masters)
    moved = sum(float((start[name].double() - masters[name].double()).square().sum()) for name in masters)
    return (far / moved) ** 0.5


SPLIT = {"model_parallel_size": 2, "pipe_parallel_size": 2}
LAYOUTS = [
    pytest.param(1, {}, id="one"),
    pytest.param(2, {}, id="dp2"),
    pytest.param(4, SPLIT, id="tp2-pp2", marks=pytest.mark.slow),
    pytest.param(4, SPLIT | {"sequence_parallel": True}, id="tp2-pp2-sp"),
]


@pytest.mark.parametrize(("ranks", "split"), LAYOUTS)
def test_matches_a_plain_loop_with_the_scaler_of_torch(plain: Any, ranks: int, split: dict[str, Any]) -> None:
    """The same scale at every step, the same skipped steps, losses to 2e-3, weights to 3 % of their total change."""
    expected, masters = plain
    records, counters, weights_after = run(ranks, **split)
    assert [(scale, applied) for _, scale, applied, _ in records] == [
        (scale, applied) for _, scale, applied in expected
    ]
    assert [loss for loss, *_ in records] == pytest.approx([loss for loss, *_ in expected], abs=2e-3)
    skipped = [not applied for *_, applied, _ in records]
    assert [overflow for *_, overflow in records] == skipped
    assert 1 <= sum(skipped) < STEPS - WINDOW, "the case is to hold an overflow and a growth of the scale"
    assert max(b / a for (_, a, *_), (_, b, *_) in itertools.pairwise(records)) == 2.0
    assert (counters.overflows, counters.not_finite) == (sum(skipped), 0)
    assert distance(weights_after, masters) < 0.03


def _divisors(rank: int, world_size: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(scale of the backward pass, scale by which gradients are divided) of each step, with and without LossScale."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from megatron.engine.deepspeed_loss_scale import LossScale

    class Optimizer:
        """The order of DeepSpeed's own step."""

        def __init__(self) -> None:
            self.loss_scaler = DynamicLossScaler(2.0**8, WINDOW, 1.0, 1, False)

        def _update_scale(self, overflow: bool) -> None:
            self.loss_scaler.update_scale(overflow)

        def step(self, overflow: bool) -> float:
            self._update_scale(overflow)
            return self.loss_scaler.cur_scale

    results: list[list[tuple[float, float]]] = []
    for deferred in (True, False):
        optimizer = Optimizer()
        scale = LossScale(optimizer) if deferred else None
        steps = []
        for _ in range(2 * WINDOW + 2):
            before = optimizer.loss_scaler.cur_scale
            steps.append((before, optimizer.step(overflow=False)))
            if scale is not None:
                scale.after_step(loss_is_finite=True)
        results.append(steps)
    return results[0], results[1]


def test_gradients_are_divided_by_the_scale_that_multiplied_the_loss() -> None:
    """By default DeepSpeed divides by twice the scale in the step in which the scale doubles."""
    [(ours, theirs)] = run_ranks(_divisors, 1)
    assert all(before == divisor for before, divisor in ours)
    assert [divisor / before for before, divisor in theirs if divisor != before] == [2.0, 2.0]
    assert [before for before, _ in ours] == [before for before, _ in theirs], "the scales themselves are the same"


def _train(rank: int, world_size: int, run_keys: dict[str, Any]) -> None:
    allow_fp16()
    run_case(CASE, world_size, run_keys)


def test_a_run_that_continues_is_bit_equal_with_its_scale(tmp_path: Path) -> None:
    """The run is interrupted with the hysteresis of 2 half used up and the window half full."""
    data = random_documents(tmp_path / "train", CASE.vocab)
    scaling = {**SCALING, "hysteresis": 2, "consecutive_hysteresis": False}
    common = {**FP16, "fp16": scaling, "train_data_paths": [data], "log_interval": 1, "lr_decay_iters": 14}

    def keys(folder: Path, iterations: int, **changes: Any) -> dict[str, Any]:
        places = {"log_dir": str(folder / "log"), "save": str(folder / "checkpoints"), "extra_save_iters": [3, 14]}
        return {**common, **places, "train_iters": iterations, **changes}

    run_ranks(_train, 2, keys(tmp_path / "whole", 14))
    run_ranks(_train, 2, keys(tmp_path / "parts", 3))
    run_ranks(_train, 2, keys(tmp_path / "parts", 14, extra_save_iters=[14]))
    for name in ("train/lm_loss", "train/loss_scale", "train/overflow_steps", "train/learning_rate"):
        assert metrics(tmp_path / "parts", name) == metrics(tmp_path / "whole", name), name
    whole, parts = weights(tmp_path / "whole", 14), weights(tmp_path / "parts", 14)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    scales = metrics(tmp_path / "whole", "train/loss_scale")
    assert scales[4] == scales[3] / 2 or scales[3] == scales[2] / 2, "the case is to be cut amid overflows"
    assert max(metrics(tmp_path / "whole", "train/skipped_steps").values()) == 0
