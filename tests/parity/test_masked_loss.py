"""A learned token has the same weight in every position: micro-batch, accumulation and data-parallel splits agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.engine_runs import IGNORE, build, make_samples, relative_difference, step
from tests.support.gradients import SPLITS, assert_equal_gradients, whole_gradients
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=40, vocab=96, seq=16)
SAMPLES = 32


def gradients(split: str, samples: list[Any]) -> list[Tensor]:
    return whole_gradients(CASE, *SPLITS[split], samples)


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    return make_samples(CASE, SAMPLES)


@pytest.fixture(scope="module")
def whole_batch(samples: list[Any]) -> list[Tensor]:
    return gradients("1x32", samples)


@pytest.mark.parametrize("split", ["4x8", "dp2x4x4"])
def test_splits_give_equal_gradients(split: str, samples: list[Any], whole_batch: list[Tensor]) -> None:
    assert_equal_gradients(gradients(split, samples), whole_batch)


def test_means_of_means_would_be_seen(samples: list[Any], whole_batch: list[Tensor]) -> None:
    """The test above is sensitive: with these uneven masks, GPT-NeoX's normalization exceeds its bound by far."""
    quarters = [whole_gradients(CASE, 1, 8, 1, samples[start : start + 8]) for start in range(0, SAMPLES, 8)]
    averaged = [torch.stack(parts).mean(0) for parts in zip(*quarters, strict=True)]
    assert relative_difference(averaged[0], whole_batch[0]) > 1e-3


def test_an_all_masked_micro_batch_changes_nothing(samples: list[Any]) -> None:
    blank = [{**sample, "labels": torch.full_like(sample["labels"], IGNORE)} for sample in samples[:8]]
    with_blank = samples[8:] + blank  # as 4x8: the last micro-batch has no learned token
    without = whole_gradients(CASE, 1, 8, 3, samples[8:])
    assert_equal_gradients(gradients("4x8", with_blank), without)


def _empty_step(rank: int, world_size: int) -> str:
    from megatron.engine.batches import EmptyBatchError

    args = CASE.neox(
        world_size=world_size,
        pipe_parallel_size=2,
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=2,
    )
    engine = build(args, CASE)
    blank = [{**s, "labels": torch.full_like(s["labels"], IGNORE)} for s in make_samples(CASE, 8)]
    with pytest.raises(EmptyBatchError, match="no token of the global batch has a target") as caught:
        step(engine, args, blank)
    return str(caught.value)


def test_a_batch_without_targets_stops_every_rank() -> None:
    assert len(set(run_ranks(_empty_step, 4))) == 1
