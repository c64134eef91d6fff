"""Continuations by the real generator at any layout, and by `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron.generation.generate import Batching, Generator, generate
from megatron.generation.sampling import RandomNumbers, Sampling
from megatron.generation.sequences import Continuation, Endings
from megatron.neox_arguments import NeoXArgs
from tests.support.models import Case

Layout = dict[str, int]


def layout(tp: int, pp: int) -> Layout:
    return {"model_parallel_size": tp, "pipe_parallel_size": pp}


def prompts(case: Case, lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(case.vocab, (length,), generator=generator).tolist() for length in lengths]


def sequences(prompts: Sequence[list[int]], limit: int, seed: int | None = None) -> list[Continuation]:
    """Continuations to generate, sampled with `seed` or greedy without."""
    return [
        Continuation(number, 0, prompt, limit)
        if seed is None
        else Continuation(number, 0, prompt, limit, RandomNumbers(seed, number, 0))
        for number, prompt in enumerate(prompts)
    ]


def continued(
    engine: Any,
    args: NeoXArgs,
    given: list[Continuation],
    sampling: Sampling | None = None,
    endings: Endings | None = None,
    batching: Batching | None = None,
) -> list[list[int]]:
    """The new ids of each sequence."""
    generator = Generator(engine, args, batching or Batching(slots=4, chunk=8))
    results = generate(generator, given, sampling or Sampling(), endings or Endings(frozenset()))
    generator.close()
    return [sequence.new for sequence in results]


def by_transformers(case: Case, prompts: Sequence[list[int]], limit: int) -> list[list[int]]:
    """Greedy continuations of each prompt alone, by `transformers.generate`."""
    model = case.hugging_face()
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=None
        )
        results.append(out[0, len(prompt) :].tolist())
    return results
