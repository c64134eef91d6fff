"""Continuations at any layout: the tokens of `transformers`, whatever the batch, the chunks and the slots."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.generation_runs import by_transformers, continued, layout, prompts, sequences
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SIZES: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 8, "layers": 4, "intermediate": 96, "vocab": 96}
UNTIED = Case(**SIZES, seq=128, rope=LLAMA3_ROPE)
TIED = Case(**SIZES, seq=128, tied=True)
LENGTHS = [3, 11, 1, 24, 8, 17, 33, 2, 9]
NEW = 64


def _greedy(rank: int, world_size: int, case: Case, split: dict[str, int], lengths: list[int], new: int) -> Any:
    from tests.support.engine_runs import inference

    args = case.neox(world_size=world_size, **split)
    engine = inference(args, dict(case.hugging_face().state_dict()))
    return continued(engine, args, sequences(prompts(case, lengths), new))


FAST = [(1, 1, TIED), (2, 2, UNTIED), (1, 4, TIED)]
SLOW = [
    (tp, pp, case)
    for tp in (1, 2, 4)
    for pp in (1, 2, 4)
    for case in (UNTIED, TIED)
    if tp * pp <= 8 and (tp, pp, case) not in FAST
]


@pytest.mark.parametrize(
    ("tp", "pp", "case"),
    [pytest.param(*point, id=f"tp{point[0]}-pp{point[1]}-{'tied' if point[2].tied else 'rope'}") for point in FAST]
    + [
        pytest.param(
            *point, id=f"tp{point[0]}-pp{point[1]}-{'tied' if point[2].tied else 'rope'}", marks=pytest.mark.slow
        )
        for point in SLOW
    ],
)
def test_greedy_is_that_of_transformers(tp: int, pp: int, case: Case) -> None:
    """Nine ragged prompts in groups of four slots, read eight tokens at a time."""
    expected = by_transformers(case, prompts(case, LENGTHS), NEW)
    for found in run_ranks(_greedy, tp * pp, case, layout(tp, pp), LENGTHS, NEW):
        assert found == expected
