"""The results of the screens as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron.common.columns import align_columns
from megatron.preflight.compare import Screen

NODES_SHOWN = 16


def overview(screens: Sequence[Screen]) -> list[str]:
    """A line for each screen: median, minimum and maximum of all devices or links, and the location of the slowest."""
    rows: list[tuple[str, ...]] = [("screen", "unit", "median", "min", "max", "slow below", "slowest")]
    for screen in screens:
        slowest = min(screen.shares, key=lambda node: screen.shares[node])
        spread = (statistics.median(screen.values), min(screen.values), max(screen.values))
        rows.append(
            (
                screen.name,
                screen.unit,
                *(f"{value:.4g}" for value in spread),
                f"{screen.limit:.0%} of median" if len(screen.nodes) > 1 else "no other node",
                f"{slowest}, {screen.worst[slowest]}: {screen.shares[slowest]:.0%}",
            )
        )
    return align_columns(rows)


def by_node(screens: Sequence[Screen], nodes: Sequence[str]) -> list[str]:
    """A line for each node: its value in each screen."""
    rows = [("node", *(screen.name for screen in screens))]
    for node in nodes:
        rows.append((node, *(f"{screen.nodes[node]:.4g}" if node in screen.nodes else "-" for screen in screens)))
    return align_columns(rows)


def worst_first(screens: Sequence[Screen], nodes: Sequence[str]) -> list[str]:
    """Nodes ordered by their worst share of a median."""

    def worst(node: str) -> float:
        return min((screen.shares[node] for screen in screens if node in screen.shares), default=1.0)

    return sorted(nodes, key=worst)


def slow_nodes(screens: Sequence[Screen], nodes: Sequence[str]) -> dict[str, str]:
    """Slow nodes in the order of `nodes`, each with its reasons."""
    found = {}
    for node in nodes:
        reasons = [screen.reason(node) for screen in screens if node in screen.slow]
        if reasons:
            found[node] = "; ".join(reasons)
    return found
