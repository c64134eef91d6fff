"""Which ranks are blamed for an unfinished phase, with 2,048 ranks on 256 nodes, TP8 x PP8 x DP32."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.parallel.gpu_placement import Seat, coordinates
from megatron.preflight.diagnosis import CONFIGURATION, STALLED, Group, Roster, numbers, phase_failure

pytestmark = pytest.mark.unit

SIZES = (8, 32, 8)
WORLD = 2048


def group(kind: str, where: str, ranks: range) -> Group:
    return Group(kind, where, tuple(ranks))


# The rank numbers by hand: tensor fastest, then data, then pipe.
TP = [group("TP group", f"(pipe {p}, data {d})", range(p * 256 + d * 8, p * 256 + d * 8 + 8)) for p in range(8)
      for d in range(32)]  # fmt: skip
PP = [group("PP group", f"(data {d}, tensor {t})", range(d * 8 + t, WORLD, 256)) for d in range(32) for t in range(8)]
DP = [group("DP group", f"(pipe {p}, tensor {t})", range(p * 256 + t, p * 256 + 256, 8)) for p in range(8)
      for t in range(8)]  # fmt: skip


def roster(seated: bool = True) -> Roster:
    nodes = [f"frontier{rank // 8:05d}" for rank in range(WORLD)]
    made = Roster(WORLD, 8, nodes)
    made.sizes = SIZES
    if seated:
        made.seats.update(
            {rank: Seat(rank, nodes[rank], rank % 8, *coordinates(rank, *SIZES)) for rank in range(WORLD)}
        )
    return made


def report(groups: list[Group], absent: set[int], silent: set[int], errors: dict[int, str] | None = None) -> str:
    arrived = set(range(WORLD)) - absent
    outcomes: dict[int, dict[str, Any]] = {rank: {"result": None} for rank in arrived - silent}
    outcomes.update({rank: {"error": text, "code": STALLED} for rank, text in (errors or {}).items()})
    found = phase_failure("the collectives", groups, roster(), arrived, outcomes, 60)
    assert found is not None
    assert found.code == STALLED
    return found.text


def test_a_phase_finished_by_all_is_not_a_failure() -> None:
    outcomes = {rank: {"result": None} for rank in range(WORLD)}
    assert phase_failure("the collectives", TP, roster(), range(WORLD), outcomes, 60) is None


def test_a_missing_rank_is_reported() -> None:
    text = report(TP, {1037}, set(range(1032, 1040)))
    assert text.splitlines() == [
        "preflight: FAILED at the collectives: 8 of 2048 ranks not done within 60 s",
        "  rank 1037 on frontier00129 (pipe 4, data 1, tensor 5) did not arrive at TP group (pipe 4, data 1), ranks "
        "1032-1039 on frontier00129",
    ]


def test_a_missing_node_is_reported() -> None:
    node = set(range(1032, 1040))
    waiting = {rank for one in DP if set(one.ranks) & node for rank in one.ranks}
    text = report(DP, node, waiting)
    assert "node frontier00129 is missing: none of its ranks 1032-1039 arrived at 8 groups" in text
    assert "stalls" not in text, "those that wait for the node are not to blame"


def test_every_group_that_stalls_is_named_up_to_a_number() -> None:
    """A node with a failed network stalls the eight groups of its ranks."""
    bad = [one for one in DP if 1032 <= one.ranks[1] < 1040]
    text = report(DP, set(), {rank for one in bad for rank in one.ranks})
    assert "DP group (pipe 4, tensor 0) stalls: ranks 1024, 1032, 1040, ... 1272 on 32 nodes (frontier00128" in text
    assert text.count(" stalls: ") == 8


def test_the_rank_that_died_among_those_that_say_so() -> None:
    ranks = TP[33].ranks
    text = report(TP, set(), set(ranks), dict.fromkeys(ranks[1:], "RuntimeError: Connection closed by peer"))
    assert "no response since: rank 264 on frontier00033 (pipe 1, data 1, tensor 0)" in text
    assert "ranks 265-271 on frontier00033: RuntimeError: Connection closed by peer" in text


def test_an_error_of_the_user_is_said_once_and_ends_with_its_code() -> None:
    outcomes = {rank: {"error": "run.yml: no such file", "code": CONFIGURATION} for rank in range(WORLD)}
    found = phase_failure("the start", [], roster(), range(WORLD), outcomes, 60)
    assert found is not None
    assert found.code == CONFIGURATION
    assert found.text.count("no such file") == 1


@pytest.mark.parametrize(
    ("planned", "local", "seats", "expected"),
    [
        (["a", "a", "b", "b"], None, {}, "b"),
        (["a", "a", "b", "b"], None, {0: "b"}, "an unknown node"),  # Slurm's plan differs from the ranks that arrived
        ([], 2, {2: "b"}, "b"),  # torchrun: the node of its neighbor
        ([], 2, {0: "a"}, "an unknown node"),
        ([], None, {3: "c"}, "c"),
    ],
)
def test_where_a_rank_should_be(planned: list[str], local: int | None, seats: dict[int, str], expected: str) -> None:
    made = Roster(4, local, planned)
    made.seats.update({rank: Seat(rank, node, 0, 0, 0, rank) for rank, node in seats.items()})
    assert made.node(3) == expected


def test_numbers() -> None:
    assert numbers([5]) == "5"
    assert numbers([3, 1, 2, 7]) == "1-3, 7"
    assert numbers(range(0, 80, 8)) == "0, 8, 16, ... 72"
