"""Scores of continuations equal those of `transformers` at every layout, independent of the rest of the batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron.evaluation.scoring import Pair, PairScore, ScoringError, score_pairs
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

# A vocabulary that is padded over two ranks, and positions beyond one padded length.
CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=95, seq=150, rope=LLAMA3_ROPE)
TIED = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=95, seq=150, tied=True)
PADDED = {"make_vocab_size_divisible_by": 8}


def sharp(case: Case) -> dict[str, torch.Tensor]:
    """Weights that make some continuations likely: random ones give every token nearly the same score."""
    return {name: tensor * (1 if "norm" in name else 6) for name, tensor in case.hugging_face().state_dict().items()}


def pairs(case: Case, count: int = 23) -> list[Pair]:
    """Continuations of 1 to 9 tokens after contexts of 1 to about 120, four of one token after every third context."""
    rng = random.Random(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(case.vocab) for _ in range(length))

    made = []
    for number in range(count):
        context = ids(rng.choice((1, 5, 30, 63, 64, 65, 120)))
        if number % 3:
            made.append(Pair(context, ids(rng.randint(1, 9))))
        else:
            made += [Pair(context, (token,)) for token in ids(4)]
    return [*made, Pair(ids(1), ids(case.seq))]  # fills the model


def likeliest(case: Case, context: tuple[int, ...], tokens: int) -> Pair:
    """The context with what `transformers` would write after it."""
    ids = torch.tensor([context])
    text = model_of(case).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return Pair(context, tuple(text[0, len(context) :].tolist()))


def model_of(case: Case) -> Any:
    model = case.hugging_face()
    model.load_state_dict(sharp(case))
    return model


def reference(case: Case, given: list[Pair]) -> list[PairScore]:
    """`transformers`, one pair at a time, without padding."""
    model = model_of(case)
    scores = []
    for pair in given:
        ids = torch.tensor([pair.context + pair.continuation])
        with torch.no_grad():
            table = model(ids[:, :-1]).logits[0, len(pair.context) - 1 :].log_softmax(-1)
        chosen = torch.tensor(pair.continuation)
        log_probs = table.gather(1, chosen[:, None])[:, 0]
        scores.append(PairScore(tuple(log_probs.tolist()), bool((table.argmax(-1) == chosen).all())))
    return scores


def difference(found: list[PairScore], expected: list[PairScore]) -> float:
    """Largest difference of a token's log-probability."""
    return max(
        abs(a - b) for f, e in zip(found, expected, strict=True) for a, b in zip(f.log_probs, e.log_probs, strict=True)
    )


def _scores(rank: int, world_size: int, case: Case, given: list[Pair], split: dict[str, int]) -> list[list[PairScore]]:
    """The pairs in order, reversed, and one at a time, in one engine; the last at another micro-batch."""
    from tests.support.engine_runs import inference

    args = case.neox(world_size=world_size, **PADDED, **split)
    engine = inference(args, sharp(case))
    alone = args.replace(train_micro_batch_size_per_gpu=1)
    return [
        score_pairs(engine, args, given),
        score_pairs(engine, args, given[::-1])[::-1],
        [score_pairs(engine, alone, [pair])[0] for pair in given[:8]],
    ]


LAYOUTS = [
    pytest.param(1, {}, id="tp1"),
    pytest.param(2, {}, id="dp2"),
    pytest.param(4, {"model_parallel_size": 2, "pipe_parallel_size": 2}, id="tp2pp2"),
    pytest.param(2, {"model_parallel_size": 2}, id="tp2", marks=pytest.mark.slow),
    pytest.param(2, {"pipe_parallel_size": 2}, id="pp2", marks=pytest.mark.slow),
    pytest.param(2, {"model_parallel_size": 2, "sequence_parallel": True}, id="tp2sp", marks=pytest.mark.slow),
    pytest.param(8, {"model_parallel_size": 2, "pipe_parallel_size": 2}, id="tp2pp2dp2", marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "split"), LAYOUTS)
def test_scores_equal_transformers(ranks: int, split: dict[str, int]) -> None:
    case = TIED if split else CASE
    given = [*pairs(case), likeliest(case, (1, 2, 3), 5), likeliest(case, (4,) * 70, 1)]
    expected = reference(case, given)
    for in_order, reversed_, alone in run_ranks(_scores, ranks, case, given, split):
        assert difference(in_order, expected) < 1e-4
        assert [score.is_greedy for score in in_order] == [score.is_greedy for score in expected]
        assert difference(reversed_, in_order) < 1e-5
        assert difference(alone, in_order[:8]) < 1e-5
    assert 2 <= sum(score.is_greedy for score in expected) < len(expected)
    # Sensitivity of the limits: the score of a neighboring token is far outside them.
    shifted = [Pair(pair.context, (*pair.continuation[:-1], pair.continuation[-1] ^ 1)) for pair in given[:8]]
    assert difference(reference(case, shifted), expected[:8]) > 0.1


@pytest.mark.unit
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair((), (1,)), "pair 0 has an empty context"),
        (Pair((1,), ()), "pair 0 has an empty continuation"),
        (Pair((1,) * 100, (2,) * 52), "pair 0 has 152 tokens, seq_length 150 allows 151"),
        (Pair((1,), (95,)), "holds token 95, the model's vocabulary ends at 94"),
    ],
)
def test_unscorable_pairs_are_reported(pair: Pair, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        score_pairs(None, CASE.neox(world_size=1), [pair])  # type: ignore[arg-type]  # before an engine is needed


def _damaged(rank: int, world_size: int) -> str:
    from tests.support.engine_runs import inference

    args = CASE.neox(world_size=world_size)
    state = sharp(CASE)
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], torch.nan)
    engine = inference(args, state)
    with pytest.raises(ScoringError) as caught:
        score_pairs(engine, args, [Pair((1,), (2,))])
    return str(caught.value)


@pytest.mark.distributed
def test_scores_that_are_not_finite_stop_the_evaluation() -> None:
    assert "the weights are damaged" in run_ranks(_damaged, 1)[0]
