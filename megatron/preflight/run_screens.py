"""The screens, phase by phase: first every device, then every link, in turns, on all nodes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from megatron.preflight import compare, measurements, pairings
from megatron.preflight.compare import DEVICE_SHARE, LINK_SHARE, Screen
from megatron.preflight.diagnosis import Group
from megatron.preflight.pairings import Pair
from megatron.preflight.phase_store import PhaseStore


class Screening:
    """One rank's part in the screens. `nodes` is by rank."""

    def __init__(self, store: PhaseStore, rank: int, device: torch.device) -> None:
        self.store, self.rank, self.device = store, rank, device
        self.nodes: list[str] = store.read("nodes")
        by_node: dict[str, list[int]] = {}
        for member, node in enumerate(self.nodes):
            by_node.setdefault(node, []).append(member)
        self.by_node = list(by_node.values())
        self.local = {member: number for members in self.by_node for number, member in enumerate(members)}

    def meet(self) -> dict[Pair, float]:
        """Every node exchanges with two or three others; returns GB/s by pair of ranks on rank 0, {} on the others.

        Runs before any larger group communicates, so that an unreachable node is reported with two ranks, not with all
        32 of a group.
        """
        return self._links("node to node", pairings.rounds_between(self.by_node))

    def run(self, between: dict[Pair, float]) -> list[Screen]:
        """All screens on rank 0, [] on the others; `between` is what `meet` returned. Collective."""
        gemm = f"GEMM {'bf16' if self.device.type == 'cuda' else 'fp32'}"
        all_ranks = [range(len(self.nodes))]
        found = self._devices(gemm, "TFLOP/s", 1e12, measurements.gemm_rate, all_ranks)
        if len(self.local) > len(self.by_node):  # devices of a package share its power: measure each alone as well
            most = max(map(len, self.by_node))
            turns = [[members[n] for members in self.by_node if n < len(members)] for n in range(most)]
            found += self._devices(f"{gemm} alone", "TFLOP/s", 1e12, measurements.gemm_rate, turns)
        found += self._devices("memory copy", "GB/s", 1e9, measurements.memory_copy_rate, all_ranks)
        limit = LINK_SHARE[self.device.type]
        inside = self._links("rank to rank in a node", pairings.rounds_inside(self.by_node))
        if inside:
            local = [self.local[rank] for rank in range(len(self.nodes))]
            found.append(compare.compare_links_inside("links inside", "GB/s", inside, self.nodes, local, limit))
        if between:
            found.append(compare.compare_links_between("network", "GB/s", between, self.nodes, limit))
        return found

    def _devices(
        self,
        name: str,
        unit: str,
        scale: float,
        measure: Callable[[torch.device], float],
        turns: Sequence[Sequence[int]],
    ) -> list[Screen]:
        """`measure` on every rank; the ranks of one turn measure at the same time."""
        values = [0.0] * len(self.nodes)
        for turn in turns:
            work = partial(measure, self.device) if self.rank in turn else _rest
            for rank, value in enumerate(self.store.phase(name, [], work)):
                if value is not None:
                    values[rank] = value / scale
        if self.rank != 0:
            return []
        return [compare.compare_devices(name, unit, values, self.nodes, DEVICE_SHARE[self.device.type])]

    def _links(self, name: str, rounds: Sequence[Sequence[Pair]]) -> dict[Pair, float]:
        """GB/s of every pair, as its slower end measured it, on rank 0; {} on the others."""
        found = {}
        for number, pairs in enumerate(rounds):
            partners = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
            partner = partners.get(self.rank)
            work = _rest if partner is None else partial(measurements.measured_link_rate, partner, self.device)
            rates = self.store.phase(
                f"{name}, round {number + 1} of {len(rounds)}",
                [Group("link", "", pair) for pair in pairs],
                work,
            )
            if rates:
                found.update({(one, other): min(rates[one], rates[other]) / 1e9 for one, other in pairs})
        return found


def _rest() -> None:
    """A turn in which this rank only waits for the others."""
