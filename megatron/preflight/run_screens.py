"""The screens, phase by phase: first every device, then every link, each in turns on all nodes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from megatron.preflight import compare, measurements, pairings
from megatron.preflight.compare import DEVICE_SHARE, LINK_SHARE, Screen
from megatron.preflight.diagnosis import Group
from megatron.preflight.pairings import Pair
from megatron.preflight.phase_store import Board


class Screening:
    """One rank's part in the screens. `nodes` is by rank."""

    def __init__(self, board: Board, rank: int, device: torch.device) -> None:
        self.board, self.rank, self.device = board, rank, device
        self.nodes: list[str] = board.ask("nodes")
        by_node: dict[str, list[int]] = {}
        for member, node in enumerate(self.nodes):
            by_node.setdefault(node, []).append(member)
        self.by_node = list(by_node.values())
        self.place = {member: place for members in self.by_node for place, member in enumerate(members)}

    def meet(self) -> dict[Pair, float]:
        """Every node exchanges with two or three others; GB/s of each pair of ranks on rank 0, elsewhere nothing.

        Done before any larger group: where a node cannot be reached, two nodes are named and not a group's 32.
        """
        return self._links("node to node", pairings.between(self.by_node))

    def run(self, between: dict[Pair, float]) -> list[Screen]:
        """All screens, `between` is what `meet` returned; on the other ranks than 0 an empty list. Collective."""
        gemm = f"GEMM {'bf16' if self.device.type == 'cuda' else 'fp32'}"
        everybody = [range(len(self.nodes))]
        found = self._devices(gemm, "TFLOP/s", 1e12, measurements.gemm, everybody)
        if len(self.place) > len(self.by_node):  # a package shares its power: does a device reach more without others?
            turns = [[members[place] for members in self.by_node if place < len(members)] for place in self._places()]
            found += self._devices(f"{gemm} alone", "TFLOP/s", 1e12, measurements.gemm, turns)
        found += self._devices("memory copy", "GB/s", 1e9, measurements.copy, everybody)
        limit = LINK_SHARE[self.device.type]
        inside = self._links("rank to rank in a node", pairings.inside(self.by_node))
        if inside:
            places = [self.place[rank] for rank in range(len(self.nodes))]
            found.append(compare.links_inside("links inside", "GB/s", inside, self.nodes, places, limit))
        if between:
            found.append(compare.links_between("network", "GB/s", between, self.nodes, limit))
        return found

    def _places(self) -> range:
        return range(max(map(len, self.by_node)))

    def _devices(
        self,
        name: str,
        unit: str,
        scale: float,
        measure: Callable[[torch.device], float],
        turns: Sequence[Sequence[int]],
    ) -> list[Screen]:
        """`measure` on every rank; those of one turn at the same time."""
        values = [0.0] * len(self.nodes)
        for turn in turns:
            mine = self.rank in turn
            told = self.board.phase(name, [], partial(measure, self.device) if mine else _rest)
            for rank, value in enumerate(told):
                if value is not None:
                    values[rank] = value / scale
        if self.rank != 0:
            return []
        return [compare.devices(name, unit, values, self.nodes, DEVICE_SHARE[self.device.type])]

    def _links(self, name: str, rounds: Sequence[Sequence[Pair]]) -> dict[Pair, float]:
        """GB/s of every pair, by its slower end; on the other ranks than 0 nothing."""
        found = {}
        for number, pairs in enumerate(rounds):
            partners = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
            told = self.board.phase(
                f"{name}, round {number + 1} of {len(rounds)}",
                [Group("link", "", pair) for pair in pairs],
                partial(measurements.exchange, partners[self.rank], self.device) if self.rank in partners else _rest,
            )
            if told:
                found.update({(one, other): min(told[one], told[other]) / 1e9 for one, other in pairs})
        return found


def _rest() -> None:
    """A turn in which this rank only waits for the others."""
