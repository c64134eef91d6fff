"""bf16 runs accumulate gradients in fp32, over micro-batches as well as over data-parallel ranks."""

from __future__ import annotations

import pytest
import torch

from tests.support.engine_runs import batch_of, build, make_samples
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, rope=LLAMA3_ROPE, seq=16)


def _reduced_gradients(rank: int, world_size: int, split: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(this rank's gradients before the reduction over data-parallel ranks, and after it), flat, fp32."""
    pp, dp = split
    args = CASE.neox(
        world_size=world_size,
        precision="bfloat16",
        pipe_parallel_size=pp,
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=2,
    )
    engine = build(args, CASE)
    seen: list[torch.Tensor] = []
    deepspeed = engine.pipeline_engine
    reduce = deepspeed._bf16_reduce_grads

    def gradients() -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in deepspeed.optimizer.get_grads_for_reduction()[0]])

    def watched() -> None:
        seen.append(gradients())
        reduce()
        seen.append(gradients())

    deepspeed._bf16_reduce_grads = watched
    samples = make_samples(CASE, 2 * dp)
    engine.train_step(batch_of(engine, args, samples))
    return seen[0], seen[1]


@pytest.mark.parametrize("split", [(1, 2), (1, 4)], ids=lambda s: "pp{}dp{}".format(*s))
def test_the_reduction_keeps_fp32(split: tuple[int, int]) -> None:
    results = run_ranks(_reduced_gradients, split[0] * split[1], split)
    expected = torch.stack([before for before, _ in results]).double().mean(0)
    for _, after in results:
        assert after.dtype == torch.float32
        error = (after.double() - expected).norm() / expected.norm()
        assert error < 1e-6, f"{error:.1e}: bf16 would be off by 1e-3"
