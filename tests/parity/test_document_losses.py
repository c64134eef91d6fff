"""Isolated documents give the same losses in every implementation and every torch; also run by `make test-site`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.engine_runs import Samples, build, make_samples, step
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=16, layers=2, rope=LLAMA3_ROPE, seq=48)
STEPS = 3

# Losses and gradient norms of the three steps under torch 2.13.0, with one attention call per document.
RECORDED = [
    (5.06964635848999, 1.3766567707061768),
    (5.087477684020996, 1.429826021194458),
    (5.087150573730469, 1.3745558261871338),
]


def samples() -> list[dict[str, Tensor]]:
    made = make_samples(CASE, 4 * STEPS)
    for number, sample in enumerate(made):
        lengths = (1 + number, 20 - number, CASE.seq - 21)
        sample["positions"] = torch.cat([torch.arange(length) for length in lengths])
    return made


def _steps(rank: int, world_size: int, way: str) -> list[tuple[float, float]]:
    from megatron.model import attention
    from tests.support import varlen

    calls = None
    if way != "one by one":
        function = getattr(varlen, way)()
        calls = function.calls
        chosen = attention.DocumentAttention(attention.Varlen(function), "")
        attention.document_attention_on = lambda *_: chosen  # type: ignore[assignment]
    args = CASE.neox(world_size=world_size, model_parallel_size=world_size, isolate_documents=True)
    engine, given = build(args, CASE), samples()
    found = [step(engine, args, Samples(given[4 * number : 4 * number + 4]), number) for number in range(STEPS)]
    assert calls is None or len(calls) == STEPS * args.gradient_accumulation_steps * CASE.layers
    return found


@pytest.mark.parametrize(("way", "ranks"), [("one by one", 1), ("Newer", 1), ("Older", 2)])
def test_losses_are_those_recorded(way: str, ranks: int) -> None:
    """To 1e-5. `Newer` and `Older` replace the varlen attention of torch 2.13 and 2.10, which needs a GPU."""
    found = run_ranks(_steps, ranks, way)[0]
    for number, (ours, recorded) in enumerate(zip(found, RECORDED, strict=True)):
        assert ours == pytest.approx(recorded, rel=1e-5), f"step {number + 1} with torch {torch.__version__}"
