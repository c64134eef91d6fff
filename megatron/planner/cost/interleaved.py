"""The order of passes in megatron-core's schedules, and the time of a step: 1F1B over virtual stages.

    pass_order(pipe, virtual, m, rank) -> [ChunkPass]                  what one rank computes, in order
    dependencies(orders, virtual)                                 raises ScheduleError if it cannot be executed
    simulate(pipe, virtual, m, forward, backward, message)        the step's time, and when each chunk is done

A model of p x v virtual stages: stage k is chunk k // p of rank k % p. Ranks send to their neighbors over directed
links, one for activations and one for gradients in each direction: a message on a link matches the next receive posted
at the other end. So both ends of every link must list the same messages in the same order. `dependencies` checks this
and that all passes can be ordered; then ranks cannot deadlock, however far ahead receives are posted and however late
messages arrive.

Standard library only. The engine's tests compare `pass_order` with what megatron-core executes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron.planner.cost.schedule import Kind, ScheduleError, Work


class ChunkPass(NamedTuple):
    """One micro-batch through one chunk of a rank's layers."""

    kind: Kind
    chunk: int
    micro_batch: int


def pass_order(pipe: int, virtual: int, num_micro_batches: int, rank: int) -> list[ChunkPass]:
    """What a rank of the pipeline computes in one step.

    Micro-batches go through the chunks in groups of `pipe` (Narayanan et al. 2021, section 2.2): a group through
    chunk 0, the same group through chunk 1, and so on. After its warm-up a rank alternates one forward with one
    backward pass, then finishes the backward passes. With virtual stages the warm-up is two passes for each later rank
    and one group for each chunk but the last.
    """
    groups = range(0, num_micro_batches, pipe if virtual > 1 else num_micro_batches)
    table = [
        (chunk, number)
        for first in groups
        for chunk in range(virtual)
        for number in range(first, min(first + groups.step, num_micro_batches))
    ]
    behind = pipe - rank - 1
    warm_up = min(len(table), behind if virtual == 1 else 2 * behind + (virtual - 1) * pipe)
    forward = [ChunkPass("forward", *entry) for entry in table]
    backward = [ChunkPass("backward", virtual - 1 - chunk, number) for chunk, number in table]
    order = forward[:warm_up]
    for there, back in zip(forward[warm_up:], backward, strict=False):
        order += [there, back]
    return order + backward[len(forward) - warm_up :]


class Step(NamedTuple):
    """A pass in an executable order of all ranks' passes; `before` is the index in that order of the pass whose message
    it needs, -1 if it needs none."""

    rank: int
    work: ChunkPass
    before: int


def dependencies(orders: Sequence[Sequence[ChunkPass]], virtual: int) -> list[Step]:
    """All ranks' passes in an executable order, each after those it needs.

    Raises ScheduleError if ranks wait for each other, or if the two ends of a link disagree about its next message.
    """
    pipe = len(orders)
    _check_links(orders, virtual)
    steps: list[Step] = []
    place: dict[tuple[Kind, int, int], int] = {}  # (kind, virtual stage, micro-batch)
    next_of = [0] * pipe
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(orders):
            while next_of[rank] < len(order):
                work = order[next_of[rank]]
                stage = work.chunk * pipe + rank
                source = _source(work.kind, stage, pipe * virtual)
                before = -1 if source is None else place.get((work.kind, source, work.micro_batch), -2)
                forward = place.get(("forward", stage, work.micro_batch))
                if before == -2 or (work.kind == "backward" and forward is None):
                    break
                place[work.kind, stage, work.micro_batch] = len(steps)
                steps.append(Step(rank, work, before))
                next_of[rank] += 1
                progress = True
    stuck = {rank: order[next_of[rank]] for rank, order in enumerate(orders) if next_of[rank] < len(order)}
    if stuck:
        waits = "; ".join(f"rank {rank} for the {work.kind} of {work[1:]}" for rank, work in stuck.items())
        raise ScheduleError(f"ranks wait for each other, (chunk, micro-batch): {waits}")
    return steps


def _source(kind: Kind, stage: int, stages: int) -> int | None:
    """The virtual stage whose message a pass needs."""
    source = stage - 1 if kind == "forward" else stage + 1
    return source if 0 <= source < stages else None


def _check_links(orders: Sequence[Sequence[ChunkPass]], virtual: int) -> None:
    pipe = len(orders)
    if pipe == 1:
        return  # nothing is sent
    kinds: tuple[tuple[Kind, int], ...] = (("forward", 1), ("backward", -1))
    for kind, direction in kinds:
        for rank, order in enumerate(orders):
            other = (rank + direction) % pipe
            sent = []
            for work in order:
                stage = work.chunk * pipe + rank + direction
                if work.kind == kind and 0 <= stage < pipe * virtual:
                    sent.append((stage // pipe, work.micro_batch))
            received = [
                (work.chunk, work.micro_batch)
                for work in orders[other]
                if work.kind == kind and _source(kind, work.chunk * pipe + other, pipe * virtual) is not None
            ]
            if sent != received:
                number = next((n for n, (a, b) in enumerate(zip(sent, received, strict=False)) if a != b), len(sent))
                raise ScheduleError(
                    f"the {kind} link from rank {rank} to rank {other}: message {number} is sent for "
                    f"{sent[number : number + 1]} and received for {received[number : number + 1]}"
                )


class _Row(NamedTuple):
    """A `Step` for a fast loop over thousands of them: indices of the virtual stage and of the link, -1 for none."""

    rank: int
    stage: int
    back: bool
    before: int
    link: int  # the sender's rank for activations, p more for gradients


@dataclass(frozen=True)
class _Program:
    steps: list[Step]
    rows: list[_Row]
    last: list[list[int]]  # [rank][chunk]: index of the last backward pass


@lru_cache(maxsize=256)
def _program(pipe: int, virtual: int, num_micro_batches: int) -> _Program:
    orders = [pass_order(pipe, virtual, num_micro_batches, rank) for rank in range(pipe)]
    steps = dependencies(orders, virtual)
    rows, last = [], [[0] * virtual for _ in range(pipe)]
    for place, (rank, (kind, chunk, _), before) in enumerate(steps):
        stage, back = chunk * pipe + rank, kind == "backward"
        sends = pipe > 1 and _source("forward" if back else "backward", stage, pipe * virtual) is not None
        rows.append(_Row(rank, stage, back, before, (rank + pipe * back) if sends else -1))
        if back:
            last[rank][chunk] = place
    return _Program(steps, rows, last)


@dataclass(frozen=True)
class Simulation:
    """A step of all ranks, seconds from the first pass."""

    seconds: float  # to the end of the last pass
    busy: tuple[float, ...]  # of each rank, computing
    left: tuple[tuple[float, ...], ...]  # [rank][chunk]: from its last backward pass to `seconds`

    @property
    def idle(self) -> float:
        """Fraction of the ranks' time spent waiting."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.seconds)

    @property
    def idle_over_busy(self) -> float:
        """How much longer the step is than the busiest rank computes: what (p - 1) / (v m) approximates."""
        return self.seconds / max(self.busy) - 1.0


def simulate(
    pipe: int,
    virtual: int,
    num_micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    message: Sequence[float] | float = 0.0,
    ready: Sequence[Sequence[float]] | None = None,
) -> Simulation:
    """Simulate one step; `forward` and `backward` are seconds of one micro-batch by virtual stage.

    `message` is the seconds of one message from each rank to the next, from the last to the first included; its
    gradient takes as long back. Messages on one link are serialized and overlap with computation. `ready[rank][chunk]`
    is when the chunk's weights have arrived.

    With virtual stages and more than 4p micro-batches, whole groups of p beyond the first 4p are not simulated: each
    takes as long as the last simulated one.
    """
    further = 0
    if virtual > 1 and num_micro_batches > 4 * pipe:
        further = (num_micro_batches - 4 * pipe) // pipe
    few = num_micro_batches - further * pipe
    program = _program(pipe, virtual, few)
    ends = _ends(program, pipe, forward, backward, message, ready)
    stop = seconds = max(ends)
    if further:
        fewer = _ends(_program(pipe, virtual, few - pipe), pipe, forward, backward, message, ready)
        seconds += further * (stop - max(fewer))
    busy = [sum(forward[rank::pipe]) + sum(backward[rank::pipe]) for rank in range(pipe)]
    return Simulation(
        seconds=seconds,
        busy=tuple(num_micro_batches * one for one in busy),
        left=tuple(tuple(stop - ends[place] for place in places) for places in program.last),
    )


def timeline(
    pipe: int,
    virtual: int,
    num_micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    message: Sequence[float] | float = 0.0,
    ready: Sequence[Sequence[float]] | None = None,
) -> list[Work]:
    """All passes of a step, each after those it needs; arguments as for `simulate`."""
    program = _program(pipe, virtual, num_micro_batches)
    ends = _ends(program, pipe, forward, backward, message, ready)
    done = []
    for (rank, (kind, chunk, number), _), stop in zip(program.steps, ends, strict=True):
        seconds = (forward if kind == "forward" else backward)[chunk * pipe + rank]
        done.append(Work(rank, kind, number, stop - seconds, stop, chunk))
    return done


def _ends(
    program: _Program,
    pipe: int,
    forward: Sequence[float],
    backward: Sequence[float],
    message: Sequence[float] | float,
    ready: Sequence[Sequence[float]] | None,
) -> list[float]:
    """When each of a program's passes ends."""
    sending = [message] * pipe if isinstance(message, (int, float)) else list(message)
    of_link = [*sending, *(sending[rank - 1] for rank in range(pipe))]
    link_free = [0.0] * (2 * pipe)
    clocks = [0.0] * pipe
    arrivals: list[float] = []  # of what a pass sends
    ends: list[float] = []
    for rank, stage, back, before, link in program.rows:
        now = clocks[rank]
        if before >= 0 and arrivals[before] > now:
            now = arrivals[before]
        if back:
            now += backward[stage]
        else:
            if ready is not None and ready[rank][stage // pipe] > now:
                now = ready[rank][stage // pipe]
            now += forward[stage]
        clocks[rank] = now
        ends.append(now)
        if link >= 0:
            now = (now if now > link_free[link] else link_free[link]) + of_link[link]
            link_free[link] = now
        arrivals.append(now)
    return ends
