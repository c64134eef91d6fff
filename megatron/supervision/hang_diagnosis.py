"""Which ranks block a run: pure functions of heartbeats and time limits.

`watchdog` collects the heartbeats and acts on the verdicts. Ranks are named by their titles (`gather_titles`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.common.quantity import quantity
from megatron.neox_arguments import NeoXArgs
from megatron.supervision.failures import LostRanks
from megatron.supervision.status_store import Beat, Whereabouts, nodes_of, titled

RANKS_SHOWN = 8
RANK_0_HEAD_START = 5  # number of heartbeats that the other ranks wait so that rank 0 reports first

# For each rank: the number of its last heartbeat, and when that arrived (seconds).
Arrivals = Mapping[int, tuple[int, float]]


@dataclass(frozen=True)
class Limits:
    """Times after which a run counts as hanging, in seconds."""

    silence: float  # without a heartbeat of a rank
    step: float  # without progress inside a training step
    other: float  # without progress anywhere else; below the collectives' own timeout, so that the watchdog is first
    interval: float  # between two heartbeats

    @classmethod
    def of_run(cls, args: NeoXArgs, world_size: int) -> Limits:
        """The limits that the configuration sets; a silence of 0 turns the watchdog off."""
        silence = args.heartbeat_timeout_seconds
        interval = min(silence / 6, 1 + world_size / 500)  # thousands of ranks share one store
        return cls(silence, 60 * args.step_timeout_minutes, 60 * 0.9 * args.distributed_timeout_minutes, interval)


@dataclass(frozen=True)
class RunVerdict:
    """Why the run ends.

    `lost` are the ranks that are dead or did not arrive, none if no rank stands out. `by` is the rank that reached this
    verdict. With `own_error` rank `by` has failed, and reports that itself.
    """

    why: str
    lost: list[int]
    by: int
    own_error: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunVerdict:
        return cls(**json.loads(text))

    def as_error(self, titles: Sequence[str], rank: int, stacks: Path | None) -> LostRanks:
        """The error that `rank` ends with; `stacks` is the folder of the stack traces, if they are written."""
        where = f"; stacks in {stacks}" if stacks else ""
        return LostRanks(self.why + where, nodes_of(self.lost, titles), first=self.by == rank)


def is_stuck(where: Whereabouts, limits: Limits, rank: int) -> bool:
    """Whether this rank's main thread has made no progress for longer than its phase allows.

    Rank 0 judges first: if thousands of ranks read all heartbeats at once, its store is busy for minutes.
    """
    limit = limits.step if where.under_step_timeout else limits.other
    return where.seconds > limit + (0 if rank == 0 else RANK_0_HEAD_START * limits.interval)


def with_arrivals(known: Arrivals, beats: Sequence[Beat], now: float) -> dict[int, tuple[int, float]]:
    """`known`, updated with the heartbeats that are new at time `now`."""
    return {
        rank: known[rank] if rank in known and known[rank][0] == beat.number else (beat.number, now)
        for rank, beat in enumerate(beats)
    }


def silent_ranks(arrivals: Arrivals, now: float, limits: Limits) -> list[int]:
    """Ranks whose last heartbeat is too old."""
    return [rank for rank, (_, arrived) in arrivals.items() if now - arrived > limits.silence]


def no_heartbeat(beats: Sequence[Beat], before: Sequence[Beat], rank: int) -> list[int]:
    """Ranks other than `rank` that sent no heartbeat between `before` and `beats`."""
    return [
        other
        for other, (old, new) in enumerate(zip(before, beats, strict=True))
        if other != rank and old.number == new.number
    ]


def lost_verdict(lost: list[int], what: str, beats: Sequence[Beat], titles: Sequence[str], by: int) -> RunVerdict:
    """The verdict that ranks are dead or frozen; `what` says how that was noticed."""
    named = [f"{titled(rank, titles)}: {what}, last seen {beats[rank].position()}" for rank in lost[:RANKS_SHOWN]]
    return RunVerdict(f"{quantity(len(lost), 'rank')} lost: " + "; ".join(named) + _more(lost), lost, by)


def rank_0_verdict(what: str, titles: Sequence[str], by: int) -> RunVerdict:
    """The verdict that rank 0, which serves the store, is dead or frozen."""
    return RunVerdict(f"1 rank lost: {titled(0, titles)}: {what}", [0], by)


def hang_verdict(beats: Sequence[Beat], where: Whereabouts, titles: Sequence[str], by: int) -> RunVerdict:
    """The verdict on a hang with all ranks alive: those outside any collective keep the others waiting in one.

    `where` is the position of the judging rank, `beats` are the last heartbeats of all ranks. If all of them are in a
    collective, or none is, no rank is lost, and the first one to fall behind is named.
    """
    hang = f"no progress for {where.seconds:.0f} s in {where.phase} of iteration {where.iteration}"
    absent = [rank for rank, beat in enumerate(beats) if not beat.waits]
    if 0 < len(absent) < len(beats):
        named = [f"{titled(rank, titles)}, {beats[rank].position()}" for rank in absent[:RANKS_SHOWN]]
        why = f"{hang}; {quantity(len(absent), 'rank')} did not arrive: " + "; ".join(named) + _more(absent)
        return RunVerdict(why, absent, by)
    first = min(range(len(beats)), key=lambda rank: (beats[rank].iteration, -beats[rank].seconds))
    why = f"{hang}; all ranks wait, none stands out; longest of all {titled(first, titles)}, {beats[first].position()}"
    return RunVerdict(why, [], by)


def _more(ranks: list[int]) -> str:
    return f" and {len(ranks) - RANKS_SHOWN} more" if len(ranks) > RANKS_SHOWN else ""
