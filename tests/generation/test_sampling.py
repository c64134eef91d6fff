"""Choice of tokens: distributions equal those of `transformers`, reproducible random numbers, ties and NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron.generation.sampling import (
    NOT_FINITE,
    RandomNumbers,
    Sampling,
    choose,
    distribution,
    draw,
    penalised,
)
from tests.support.ranks import run_ranks


def numbers_of(seed: int, prompt: int, sample: int, count: int) -> NDArray[np.float64]:
    random = RandomNumbers(seed, prompt, sample)
    return np.array([random.at(position) for position in range(count)])


LIMITS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


def _by_transformers(logits: torch.Tensor, limits: dict[str, Any]) -> torch.Tensor:
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper
    from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

    steps = LogitsProcessorList([TemperatureLogitsWarper(limits["temperature"])])
    if "top_k" in limits:
        steps.append(TopKLogitsWarper(limits["top_k"]))
    if "top_p" in limits:
        steps.append(TopPLogitsWarper(limits["top_p"]))
    if "min_p" in limits:
        steps.append(MinPLogitsWarper(limits["min_p"]))
    return steps(torch.zeros(len(logits), 1, dtype=torch.int64), logits.double()).softmax(-1)


@pytest.mark.unit
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "-".join(limits))
def test_distributions_equal_transformers(limits: dict[str, Any]) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    found = distribution(logits, Sampling(**limits))
    found = found / found.sum(-1, keepdim=True)
    torch.testing.assert_close(found, _by_transformers(logits, limits), rtol=1e-6, atol=1e-9)


@pytest.mark.unit
def test_the_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 5, 5], [0, 19, 3]])
    seen = torch.zeros(2, 20, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    torch.testing.assert_close(penalised(logits, seen, 1.7), expected, rtol=1e-6, atol=0)


@pytest.mark.unit
def test_tokens_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]], dtype=torch.float64)
    numbers = torch.from_numpy(numbers_of(1, 0, 0, 20_000))
    tokens = draw(probabilities.expand(len(numbers), -1), numbers)
    shares = torch.bincount(tokens, minlength=6) / len(numbers)
    torch.testing.assert_close(shares.double(), probabilities[0], rtol=0, atol=0.015)  # 4 standard errors
    edges = draw(probabilities.expand(4, -1), torch.tensor([0.0, 0.4999, 0.5001, 1 - 2.0**-53]))
    assert edges.tolist() == [1, 1, 3, 4], "never a token of probability 0"


@pytest.mark.unit
def test_random_numbers_depend_on_seed_prompt_sample_and_position_alone() -> None:
    first = numbers_of(7, 3, 1, 600)
    others = [numbers_of(*key, 600) for key in ((8, 3, 1), (7, 4, 1), (7, 3, 2), (73, 1, 1))]
    assert all(not np.intersect1d(first, other).size for other in others)
    assert ((first >= 0) & (first < 1)).all()
    assert len(set(first)) == 600, "blocks do not repeat"
    backwards = RandomNumbers(7, 3, 1)
    assert [backwards.at(position) for position in reversed(range(600))] == first[::-1].tolist()
    # Random123's vector for Philox 4x64-10 with key and counter 0: numpy counts before it draws.
    zero = np.random.Philox(key=0, counter=2**256 - 1).random_raw(1)
    assert int(zero[0]) == 0x16554D9ECA36314C


def _chosen(rank: int, world_size: int, logits: torch.Tensor, limits: dict[str, Any], vocab: int) -> list[int]:
    group = torch.distributed.group.WORLD
    assert group is not None
    local = logits.chunk(world_size, -1)[rank]
    return choose(local, Sampling(**limits), vocab, group, numbers_of(0, 0, 0, len(logits))).tolist()


@pytest.mark.distributed
def test_shards_choose_the_same_tokens() -> None:
    """Four ranks, the last with padding rows of the vocabulary: ties, NaN, the same draws."""
    logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(2))
    logits[:, 27:] = 50.0  # not in the vocabulary
    logits[0, [3, 13, 23]] = 9.0
    logits[1, 12] = torch.nan
    logits[2, 5] = torch.inf
    expected = logits[:, :27].argmax(-1).tolist()
    expected[0], expected[1], expected[2] = 3, NOT_FINITE, NOT_FINITE
    for found in run_ranks(_chosen, 4, logits, {}, 27):
        assert found == expected
    sampled = run_ranks(_chosen, 4, logits, {"temperature": 2.0, "top_p": 0.9}, 27)
    assert sampled == run_ranks(_chosen, 1, logits, {"temperature": 2.0, "top_p": 0.9}, 27) * 4
    assert sampled[0][1] == sampled[0][2] == NOT_FINITE
    assert len(set(sampled[0])) > 3
