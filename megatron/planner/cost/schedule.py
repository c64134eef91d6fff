"""The timing of each stage in one step under DeepSpeed's pipeline engine, from the instructions that it executes.

The engine lists a stage's instructions in order; here each is assigned a time: a receive waits for its matching send,
everything else follows its predecessor. megatron-core's order: `megatron.planner.cost.interleaved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Work:
    """One pass of a micro-batch through a stage, or through one chunk of its layers."""

    stage: int
    kind: Kind
    micro_batch: int
    start: float
    stop: float
    chunk: int = 0


class ScheduleError(RuntimeError):
    """The schedule cannot be executed: stages wait for each other, or for a different message from the one sent."""


def timeline(num_micro_batches: int, forward: Sequence[float], backward: Sequence[float]) -> list[Work]:
    """All passes of a step in order of their end; `forward` and `backward` are seconds by stage. Imports DeepSpeed."""
    from megatron.engine.deepspeed_schedule import stage_instructions

    stages = len(forward)
    pending = [stage_instructions(num_micro_batches, stages, stage) for stage in range(stages)]
    clocks = [0.0] * stages
    counts: dict[tuple[int, str], int] = {}
    sent: dict[tuple[int, str, int], float] = {}  # (receiving stage, what, micro-batch) -> time of arrival
    done: list[Work] = []
    while any(pending):
        progress = False
        for stage, instructions in enumerate(pending):
            while instructions:
                name = instructions[0]
                number = counts.get((stage, name), 0)
                if name in _ARRIVES and (stage, _ARRIVES[name], number) not in sent:
                    break
                instructions.pop(0)
                counts[stage, name] = number + 1
                progress = True
                if name in _ARRIVES:
                    clocks[stage] = max(clocks[stage], sent[stage, _ARRIVES[name], number])
                elif name in _SENDS:
                    step, what = _SENDS[name]
                    sent[stage + step, what, number] = clocks[stage]
                elif name in _PASSES:
                    seconds = (forward if _PASSES[name] == "forward" else backward)[stage]
                    done.append(Work(stage, _PASSES[name], number, clocks[stage], clocks[stage] + seconds))
                    clocks[stage] += seconds
        if not progress:
            raise ScheduleError(f"stages wait for each other: next are {[row[0] for row in pending if row]}")
    return sorted(done, key=lambda work: work.stop)


# Both ends of a link list these in the same order, so that the n-th receive matches the n-th send.
_ARRIVES = {"RecvActivation": "activation", "RecvGrad": "gradient"}
_SENDS = {"SendActivation": (+1, "activation"), "SendGrad": (-1, "gradient")}
_PASSES: dict[str, Kind] = {"ForwardPass": "forward", "BackwardPass": "backward"}


def idle_share(work: Sequence[Work], stages: int) -> float:
    """Fraction of the stages' time, from the first pass to the last, spent waiting."""
    end = max(one.stop for one in work)
    busy = sum(one.stop - one.start for one in work)
    return 1.0 - busy / (stages * end)
