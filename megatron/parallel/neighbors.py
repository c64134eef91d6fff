"""Pairs of neighboring pipeline stages, in rounds whose pairs can communicate at the same time."""

from __future__ import annotations

Pair = tuple[int, int]
"""Global ranks (of a stage, of the next stage)."""


def neighbor_rounds(stages: int, ranks_per_stage: int, closed: bool) -> list[list[Pair]]:
    """Rounds of pairs of neighbors in which each rank has at most one partner, in the next or the previous stage.

    `closed`: the last stage is followed by the first, as with virtual stages; two stages are then neighbors twice, once
    in each direction. There are two rounds, or three for a closed ring with an odd number of stages.
    """
    rounds: dict[int, list[Pair]] = {}
    for stage in range(0 if stages == 1 else stages if closed else stages - 1):  # stages that have a next one
        closes_an_odd_ring = stages % 2 == 1 and stage == stages - 1
        pairs = rounds.setdefault(2 if closes_an_odd_ring else stage % 2, [])
        following = (stage + 1) % stages
        pairs += [(stage * ranks_per_stage + n, following * ranks_per_stage + n) for n in range(ranks_per_stage)]
    return [rounds[number] for number in sorted(rounds)]
