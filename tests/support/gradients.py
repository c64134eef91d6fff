"""Gradients of a global batch, split in several ways, read from Adam's first moment after one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.engine_runs import build, relative_difference, step
from tests.support.models import Case
from tests.support.ranks import run_ranks

SPLITS = {"1x32": (1, 32, 1), "4x8": (1, 8, 4), "dp2x4x4": (2, 4, 4)}  # name: (DP, micro-batch, accumulation)


def _shard(rank: int, world_size: int, case: Case, keys: dict[str, Any], samples: list[Any]) -> list[Tensor]:
    """This rank's shard of the gradients, by parameter group."""
    args = case.neox(world_size=world_size, gradient_clipping=1e9, **keys)
    engine: Any = build(args, case)
    step(engine, args, samples)
    inner = engine.pipeline_engine.optimizer.optimizer
    beta1 = args.optimizer.params.betas[0]
    return [inner.state[group["params"][0]]["exp_avg"] / (1 - beta1) for group in inner.param_groups]


def whole_gradients(
    case: Case, dp: int, micro: int, accumulation: int, samples: list[Any], **keys: Any
) -> list[Tensor]:
    """Flat gradients of the matrices and of the norms of `case`, without ZeRO's padding."""
    keys |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    shards = run_ranks(_shard, dp, case, keys, samples)
    norms = case.hidden * (2 * case.layers + 1)
    sizes = (case.neox(world_size=1).shape.num_parameters - norms, norms)
    flat = [torch.cat(parts) for parts in zip(*shards, strict=True)]
    return [gradient[:size] for gradient, size in zip(flat, sizes, strict=True)]


def assert_equal_gradients(a: list[Tensor], b: list[Tensor]) -> None:
    for gradient, expected in zip(a, b, strict=True):
        assert relative_difference(gradient, expected) < 1e-6
