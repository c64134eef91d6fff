"""Which nodes and links are slow: every measurement against the median of all. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron.preflight.pairings import Pair

# A node below this share of the median is slow. The limits are our own, and wide: GCDs of a healthy machine differ by a
# few percent, shared links vary more than devices, and a CPU shares its cores with other processes.
DEVICE_SHARE = {"cuda": 0.9, "cpu": 0.5}
LINK_SHARE = {"cuda": 0.75, "cpu": 0.4}


@dataclass(frozen=True)
class Screen:
    """One measurement of all nodes.

    `values` holds all measured values, `nodes` the value that represents each node, `shares` that value as a share of
    the median.
    """

    name: str
    unit: str
    values: list[float]
    nodes: dict[str, float]
    shares: dict[str, float]
    limit: float
    worst: dict[str, str]  # which part of the node its value comes from: a rank, a pair of ranks, another node
    slow_links: list[str] = field(default_factory=list)

    @property
    def slow(self) -> list[str]:
        """Slow nodes. A single node cannot be compared with others and is never slow."""
        if len(self.nodes) < 2:
            return []
        return [node for node, share in self.shares.items() if share < self.limit]

    def reason(self, node: str) -> str:
        """Why a node is slow: `GEMM 0.85 of the median (rank 21)`."""
        return f"{self.name} {self.shares[node]:.2f} of the median ({self.worst[node]})"


def compare_devices(name: str, unit: str, values: Sequence[float], nodes: Sequence[str], limit: float) -> Screen:
    """A measurement of every rank's device; a node is as slow as its slowest. `values` and `nodes` are by rank."""
    median = statistics.median(values)
    slowest: dict[str, int] = {}
    for rank, node in enumerate(nodes):
        if node not in slowest or values[rank] < values[slowest[node]]:
            slowest[node] = rank
    return Screen(
        name,
        unit,
        list(values),
        {node: values[rank] for node, rank in slowest.items()},
        {node: values[rank] / median for node, rank in slowest.items()},
        limit,
        {node: f"rank {rank}" for node, rank in slowest.items()},
    )


def compare_links_inside(
    name: str, unit: str, values: Mapping[Pair, float], nodes: Sequence[str], local: Sequence[int], limit: float
) -> Screen:
    """Links between the ranks of each node, each against the same pair of local ranks on the other nodes.

    The links of a node differ by design (an MI250X node has pairs with four, two, one and no direct link).
    """
    of_local_pair: dict[Pair, list[float]] = {}
    for (one, other), value in values.items():
        of_local_pair.setdefault((local[one], local[other]), []).append(value)
    medians = {pair: statistics.median(rates) for pair, rates in of_local_pair.items()}
    slowest: dict[str, Pair] = {}
    shares = {pair: value / medians[local[pair[0]], local[pair[1]]] for pair, value in values.items()}
    for pair in values:
        node = nodes[pair[0]]
        if node not in slowest or shares[pair] < shares[slowest[node]]:
            slowest[node] = pair
    return Screen(
        name,
        unit,
        list(values.values()),
        {node: values[pair] for node, pair in slowest.items()},
        {node: shares[pair] for node, pair in slowest.items()},
        limit,
        {node: f"ranks {one} and {other}" for node, (one, other) in slowest.items()},
    )


def compare_links_between(
    name: str, unit: str, values: Mapping[Pair, float], nodes: Sequence[str], limit: float
) -> Screen:
    """Links between nodes. A node is as fast as its best link: one that is slow with all its partners is slow itself.

    Links are compared with the median of the nodes' best links. A slow link between two nodes that are not slow is
    reported separately.
    """
    node_links: dict[tuple[str, str], float] = {}
    for (one, other), value in values.items():
        ends = (nodes[one], nodes[other])
        node_links[ends] = node_links.get(ends, 0.0) + value  # local ranks send at once and share the network
    best: dict[str, tuple[str, str]] = {}
    for ends, value in node_links.items():
        for node in ends:
            if node not in best or value > node_links[best[node]]:
                best[node] = ends
    median = statistics.median(node_links[ends] for ends in best.values())
    shares = {node: node_links[ends] / median for node, ends in best.items()}
    slow = {node for node, share in shares.items() if share < limit}
    slow_links = [
        f"{one} - {other}: {value:.3g} {unit}, {value / median:.2f} of the median"
        for (one, other), value in node_links.items()
        if value / median < limit and not {one, other} & slow
    ]
    partner = {node: ends[1] if ends[0] == node else ends[0] for node, ends in best.items()}
    return Screen(
        name,
        unit,
        list(node_links.values()),
        {node: node_links[ends] for node, ends in best.items()},
        shares,
        limit,
        {node: f"with {partner[node]}, its best partner" for node in best},
        slow_links,
    )
