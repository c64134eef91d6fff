"""Pairings of ranks, in rounds in which each has at most one partner. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[int, int]


def tournament(count: int) -> list[list[Pair]]:
    """Rounds in which each of `count` meets every other once (the circle method); if `count` is odd, one pauses in each
    round."""
    places = list(range(count + count % 2))
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        meetings = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in meetings if max(pair) < count])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def ring_and_across(count: int) -> list[list[Pair]]:
    """Rounds in which each of `count` meets its two neighbors in a ring, and the one on the opposite side.

    Several partners distinguish a slow node (slow with all of them) from a slow link (slow with one). For any number of
    nodes there are at most four rounds.
    """
    rounds = [
        [(first, first + 1) for first in range(0, count - 1, 2)],
        [(first, first + 1) for first in range(1, count - 1, 2)],
    ]
    if count > 2 and count % 2 == 0:
        rounds[1].append((0, count - 1))
    elif count > 2:
        rounds.append([(0, count - 1)])
    if count > 3:
        rounds.append([(first, first + count // 2) for first in range(count // 2)])
    return [pairs for pairs in rounds if pairs]


def rounds_inside(nodes: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Rounds of rank pairs in which all pairs of each node meet, on all nodes at once."""
    rounds = [
        [(ranks[one], ranks[other]) for ranks in nodes for one, other in pairs if other < len(ranks)]
        for pairs in tournament(max(map(len, nodes)))
    ]
    return [pairs for pairs in rounds if pairs]


def rounds_between(nodes: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Rounds of rank pairs in which nodes meet: each rank exchanges with the same local rank of the other node."""
    return [
        [pair for one, other in pairs for pair in zip(nodes[one], nodes[other], strict=False)]
        for pairs in ring_and_across(len(nodes))
    ]
