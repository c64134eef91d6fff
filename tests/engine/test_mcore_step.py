"""If a gradient is not finite on any rank, all ranks of engine: megatron skip the step and keep their state."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.variant_runs import GLOBAL_BATCH, UNTIED, Variant

pytestmark = pytest.mark.distributed

SMALL = Variant(replace(UNTIED, layers=2))
SPLIT = (2, 1, 2)  # TP, PP, DP


def _stepped(rank: int, world_size: int, poison: dict[str, Any], mutation: str) -> dict[str, Any]:
    """Two steps, the second with a corrupted gradient on one rank; returns its effect on this rank."""
    from megatron.engine import mcore_optimizer
    from tests.support.engine_runs import build, step

    args = SMALL.arguments(SPLIT, poison["sliced"], engine="megatron", overlap_param_gather=False)
    engine: Any = build(args, SMALL.case)
    samples = SMALL.samples()
    step(engine, args, samples[:GLOBAL_BATCH])
    parameters = [p for _, layer in engine.numbered_layers() for p in layer.parameters()]
    shards = [tensor for shard in engine.optimizer_shards() for tensor in shard.tensors.values()]
    before = [tensor.detach().clone() for tensor in [*parameters, *shards]]
    if rank == poison["rank"]:
        named = (pair for _, layer in engine.numbered_layers() for pair in layer.named_parameters())
        parameter = next(p for name, p in named if poison["tensor"] in name)
        parameter.register_hook(lambda gradient: gradient * poison["value"])
    optimizer = engine._optimizer
    if mutation == "megatron-core's own step":
        optimizer.optimizer.tp_group = engine.groups.tensor
        optimizer.optimizer.grad_stats_parallel_group = torch.distributed.group.WORLD

        def theirs(loss: Any) -> tuple[float, float, bool]:
            applied, norm, _ = optimizer.optimizer.step()
            return 0.0, norm, applied

        optimizer.step = theirs
    elif mutation == "only what is counted":
        norms_of, counted = torch._foreach_norm, optimizer._counted
        mcore_optimizer.torch._foreach_norm = lambda gradients: [
            norm if weight else torch.zeros(()) for norm, weight in zip(norms_of(gradients), counted, strict=True)
        ]
    step(engine, args, samples[GLOBAL_BATCH : 2 * GLOBAL_BATCH], 1)
    after = [*parameters, *(tensor for shard in engine.optimizer_shards() for tensor in shard.tensors.values())]
    return {
        "skipped": engine.counters.skipped,
        "unchanged": all(torch.equal(old, new) for old, new in zip(before, after, strict=True)),
        "finite": all(bool(tensor.isfinite().all()) for tensor in after),
        "steps": {shard.step for shard in engine.optimizer_shards()},
    }


NORM = {"tensor": "layernorm", "value": math.nan}
POISONS = [
    pytest.param({**NORM, "rank": 1, "sliced": False}, id="NaN in the second tensor rank's copy of a norm"),
    pytest.param({**NORM, "rank": 1, "sliced": True}, id="the same under sequence parallelism"),
    pytest.param({"tensor": "dense", "value": math.inf, "rank": 2, "sliced": False}, id="infinity in one replica"),
]


@pytest.mark.parametrize("poison", POISONS)
def test_no_rank_applies_a_nonfinite_gradient(poison: dict[str, Any]) -> None:
    for rank in run_ranks(_stepped, 4, poison, ""):
        assert rank == {"skipped": 1, "unchanged": True, "finite": True, "steps": {1}}


@pytest.mark.parametrize("mutation", ["megatron-core's own step", "only what is counted"])
def test_without_the_guard_a_nonfinite_gradient_is_applied(mutation: str) -> None:
    """megatron-core's step does not synchronize the decision, and its norm ignores replicated copies on other ranks."""
    ranks = run_ranks(_stepped, 4, POISONS[0].values[0], mutation)
    assert not all(rank["finite"] for rank in ranks)
