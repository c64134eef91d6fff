"""Why a phase failed, and which ranks or groups are the cause: pure functions of the contents of the phase store."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.parallel.gpu_placement import Seat, coordinates

CONFIGURATION, STALLED, SLOW, SOCKETS = 2, 3, 4, 5  # exit codes, docs/preflight.md

_SHOWN = 8  # number of groups, or ranks, that are named one by one


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other, named by `kind` and `where`: "TP group", "(pipe 1, data 0)"."""

    kind: str
    where: str
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.where}".rstrip()


class Roster:
    """Which rank is on which node: Slurm's plan (`planned`, by rank), and the locations that the ranks have
    reported."""

    def __init__(self, world_size: int, local_world_size: int | None = None, planned: Sequence[str] = ()) -> None:
        self.world_size, self._local_world_size, self._planned = world_size, local_world_size, planned
        self.seats: dict[int, Seat] = {}
        self.sizes: tuple[int, int, int] | None = None  # pipe, data, tensor, once the configuration is read

    def node(self, rank: int) -> str:
        """Node of a rank, even of one that never arrived: from Slurm's plan, or from its neighbors."""
        if rank in self.seats:
            return self.seats[rank].node
        size = self._local_world_size
        if size:
            first = rank // size * size
            nodes = {self.seats[other].node for other in range(first, first + size) if other in self.seats}
            if len(nodes) == 1:
                return nodes.pop()
        if len(self._planned) == self.world_size and self._plan_holds():
            return self._planned[rank]
        return "an unknown node"

    def nodes(self) -> list[str]:
        """The node of every rank."""
        return [self.node(rank) for rank in range(self.world_size)]

    def _plan_holds(self) -> bool:
        return all(self._planned[rank] == seat.node for rank, seat in self.seats.items())

    def named(self, rank: int) -> str:
        """`rank 5 on n2 (pipe 1, data 0, tensor 1)`."""
        where = ""
        if self.sizes:
            where = " (pipe {}, data {}, tensor {})".format(*coordinates(rank, *self.sizes))
        return f"rank {rank} on {self.node(rank)}{where}"

    def several(self, ranks: Collection[int]) -> str:
        """`ranks 4-5 on n2`, `ranks 0, 2, 4, 6 on 4 nodes (n0, n1, n2, n3)`."""
        nodes = list(dict.fromkeys(map(self.node, sorted(ranks))))
        shown = ", ".join(nodes[:_SHOWN]) + (", ..." if len(nodes) > _SHOWN else "")
        where = nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes ({shown})"
        return f"rank{'s' * (len(ranks) > 1)} {numbers(ranks)} on {where}"


def numbers(ranks: Collection[int]) -> str:
    """`0-3, 8`; `0, 4, 8, ... 60` for many that do not form ranges."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts) if len(texts) <= _SHOWN else f"{', '.join(texts[:3])}, ... {texts[-1]}"


@dataclass(frozen=True)
class PhaseFailure:
    """How all processes end: an exit code and the text that rank 0 prints."""

    code: int
    text: str


def phase_failure(
    phase: str,
    groups: Sequence[Group],
    roster: Roster,
    arrived: Collection[int],
    outcomes: Mapping[int, Mapping[str, Any]],
    seconds: float,
) -> PhaseFailure | None:
    """Why a phase has failed, None if it has not.

    `arrived` are the ranks that began the phase. `outcomes` holds the results of those that finished it, by rank:
    {"result": ...}, or {"error": text, "code": exit code}. `seconds` is the time limit of the phase.
    """
    errors = {rank: outcome for rank, outcome in outcomes.items() if "error" in outcome}
    if not errors and len(outcomes) == roster.world_size:
        return None
    # A configuration error is reported alone: the rest follows from it.
    wrong = {rank: outcome for rank, outcome in errors.items() if outcome["code"] == CONFIGURATION}
    if wrong:
        return PhaseFailure(CONFIGURATION, "\n".join([f"preflight: FAILED at {phase}", *_errors(wrong, roster)]))
    absent = [rank for rank in range(roster.world_size) if rank not in arrived]
    lines = [f"preflight: FAILED at {phase}"]
    if len(outcomes) < roster.world_size:
        unfinished = roster.world_size - len(outcomes)
        lines[0] += f": {unfinished} of {roster.world_size} ranks not done within {seconds:.0f} s"
    # Ranks that never began come first; groups that wait for them are not at fault.
    lines += _absent(absent, groups, roster)
    stalled = [group for group in groups if not set(absent) & set(group.ranks) and _stalls(group, outcomes)]
    for group in stalled[:_SHOWN]:
        silent = [rank for rank in group.ranks if rank not in outcomes]
        verb = "stalls" if silent else "fails"
        lines.append(f"  {group.name} {verb}: {roster.several(group.ranks)}, all of which arrived")
        if silent and len(silent) < len(group.ranks):
            lines.append(f"    no response since: {'; '.join(map(roster.named, silent[:_SHOWN]))}")
        own_errors = {rank: errors[rank] for rank in group.ranks if rank in errors}
        lines += [f"  {line}" for line in _errors(own_errors, roster)]
    if len(stalled) > _SHOWN:
        lines.append(f"  and {len(stalled) - _SHOWN} more groups")
    if not absent and not stalled:
        lines += _errors(errors, roster)
        silent = [rank for rank in range(roster.world_size) if rank not in outcomes]
        lines += [f"  {roster.named(rank)} arrived and did not finish" for rank in silent[:_SHOWN]]
    return PhaseFailure(STALLED, "\n".join(lines))


def _stalls(group: Group, outcomes: Mapping[int, Mapping[str, Any]]) -> bool:
    return any(rank not in outcomes or "error" in outcomes[rank] for rank in group.ranks)


def _absent(absent: Sequence[int], groups: Sequence[Group], roster: Roster) -> list[str]:
    """A line for each rank that did not arrive, or for each node none of whose ranks did."""
    lines = []
    by_node: dict[str, list[int]] = {}
    for rank in absent:
        by_node.setdefault(roster.node(rank), []).append(rank)
    for node, ranks in by_node.items():
        others = any(roster.node(rank) == node for rank in range(roster.world_size) if rank not in absent)
        waiting = [group for group in groups if set(ranks) & set(group.ranks)]
        at_what = f" at {waiting[0].name}" if len(waiting) == 1 else f" at {len(waiting)} groups" if waiting else ""
        if len(ranks) > 1 and not others:
            lines.append(f"  node {node} is missing: none of its ranks {numbers(ranks)} arrived{at_what}")
            continue
        for rank in ranks:
            of_rank = [group for group in waiting if rank in group.ranks]
            where = f" at {of_rank[0].name}, {roster.several(of_rank[0].ranks)}" if len(of_rank) == 1 else at_what
            lines.append(f"  {roster.named(rank)} did not arrive{where}")
    if len(lines) > 4 * _SHOWN:
        lines = [*lines[: 4 * _SHOWN], f"  and {len(lines) - 4 * _SHOWN} more"]
    return lines


def _errors(errors: Mapping[int, Mapping[str, Any]], roster: Roster) -> list[str]:
    """A line for each error text, with the ranks that reported it."""
    by_text: dict[str, list[int]] = {}
    for rank, outcome in errors.items():
        by_text.setdefault(outcome["error"], []).append(rank)
    return [f"  {roster.several(ranks)}: {text}" for text, ranks in list(by_text.items())[:_SHOWN]]
