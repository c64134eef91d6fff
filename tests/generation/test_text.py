"""Text from an engine: the tokens of `transformers` at temperature 0, and limits of sampling."""

from __future__ import annotations

import pytest
import torch

from megatron.generation.text import choose
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=4, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
SPLIT = {"model_parallel_size": 2, "pipe_parallel_size": 2}


@pytest.mark.unit
def test_sampling_keeps_to_its_limits() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(**keys: object) -> set[int]:
        args = Case().neox(world_size=1, **keys)
        return {choose(logits, args, generator) for _ in range(300)}

    assert drawn(temperature=0.0) == {1}
    assert drawn(temperature=2.0, top_k=2) == {1, 2}
    probabilities = (logits / 2.0).softmax(-1)
    assert drawn(temperature=2.0, top_p=float(probabilities[1]) + 0.01) == {1, 2}
    assert drawn(temperature=2.0) == {0, 1, 2, 3, 4}


def _greedy(rank: int, world_size: int, prompt: list[int], tokens: int) -> tuple[list[int], bool]:
    from megatron.generation.text import continue_text
    from tests.support.engine_runs import inference

    args = CASE.neox(world_size=world_size, maximum_tokens=tokens, **SPLIT)
    engine = inference(args, dict(CASE.hugging_face().state_dict()))
    return continue_text(engine, args, prompt, ends={CASE.vocab}, generator=torch.Generator())


@pytest.mark.distributed
def test_greedy_generation_equals_transformers() -> None:
    prompt, count = [5, 17, 80], 9
    reference = CASE.hugging_face()
    ids = torch.tensor([prompt])
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    results = run_ranks(_greedy, 4, prompt, count)
    assert results == [(expected, False)] * 4
