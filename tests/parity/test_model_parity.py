"""Logits equal `transformers`' LlamaForCausalLM to 1e-5 in fp32; with four known mistakes they do not.

Agreement of the top token would prove nothing: a model with any of the mutations below is still fluent.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.engine_runs import inference, whole_logits
from tests.support.models import LLAMA3_ROPE, Case, llama3_rope
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
ROPE_32 = llama3_rope(32.0, 64)
CASES = {
    "gqa-8-2": Case(heads=8, kv_heads=2, head_dim=64, rope=LLAMA3_ROPE, theta=500000.0, seq=128),
    "gqa-8-1": Case(heads=8, kv_heads=1, head_dim=64, rope=ROPE_32, theta=500000.0, seq=128),
    "mha-8-8": Case(heads=8, kv_heads=8, head_dim=64),
    "gqa-8-2-wide-heads": Case(heads=8, kv_heads=2, head_dim=128, rope=ROPE_32, theta=500000.0, seq=128),
    "mha-8-8-wide-heads": Case(heads=8, kv_heads=8, head_dim=128, rope=LLAMA3_ROPE, theta=500000.0, seq=128),
    "gqa-8-1-wide-heads": Case(heads=8, kv_heads=1, head_dim=128),
}
GRID = [
    pytest.param(replace(case, tied=tied), tp, id=f"{name}-{'tied' if tied else 'untied'}-tp{tp}")
    for name, case in CASES.items()
    for tied in (False, True)
    for tp in (1, 2, 4)
    if case.kv_heads % tp == 0
]


def _largest_difference(rank: int, world_size: int, case: Case, mutation: str | None) -> float:
    reference = case.hugging_face()
    args = case.neox(model_parallel_size=world_size, world_size=world_size)
    if mutation == "rope scaling dropped":
        args = replace(case, rope=None).neox(model_parallel_size=world_size, world_size=world_size)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    engine = inference(args, _mutated(state, case, mutation))
    if mutation == "epsilon outside the root":
        for _, layer in engine.numbered_layers():
            _epsilon_outside(layer)
    ids = torch.randint(case.vocab, (2, case.seq), generator=torch.Generator().manual_seed(1))
    ours = whole_logits(engine, args, ids)
    assert ours is not None
    with torch.no_grad():
        theirs = reference(ids).logits
    return float((ours - theirs).abs().max())


def _mutated(state: dict[str, Tensor], case: Case, mutation: str | None) -> dict[str, Tensor]:
    first = "model.layers.0."
    if mutation == "q and k rows interleaved":  # Meta's layout taken for Hugging Face's
        for name in ("q_proj", "k_proj"):
            key = f"{first}self_attn.{name}.weight"
            state[key] = state[key].unflatten(0, (-1, 2, case.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    if mutation == "gate and up swapped":
        up, gate = f"{first}mlp.up_proj.weight", f"{first}mlp.gate_proj.weight"
        state[up], state[gate] = state[gate], state[up]
    return state


def _epsilon_outside(model: torch.nn.Module) -> None:
    from megatron.model.llama import RMSNorm

    def outside(self: RMSNorm, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.scale

    def after_add(self: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x + residual, outside(self, x + residual)

    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = outside.__get__(module)  # type: ignore[method-assign]
            module.after_add = after_add.__get__(module)  # type: ignore[method-assign]


@pytest.mark.parametrize(("case", "tp"), GRID)
def test_logits_equal_transformers(case: Case, tp: int) -> None:
    assert max(run_ranks(_largest_difference, tp, case, None)) < TOLERANCE


@pytest.mark.parametrize(
    "mutation",
    ["q and k rows interleaved", "gate and up swapped", "rope scaling dropped", "epsilon outside the root"],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_known_mistakes_are_seen(mutation: str, tp: int) -> None:
    assert max(run_ranks(_largest_difference, tp, CASES["gqa-8-2"], mutation)) > 100 * TOLERANCE
