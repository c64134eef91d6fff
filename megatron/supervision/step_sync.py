"""The one small all-reduce between two steps: everything that the ranks must agree on or report to each other.

A signal to stop, a request for a profile, and how long each phase of the last step took and on which rank it took
longest: some eighty bytes, reduced by MAX. A time is encoded as microseconds with the rank in its lowest bits, so that
the maximum also identifies its rank.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron.supervision.step_timers import TIMED, WAITING

_RANK_BITS = 20


@dataclass(frozen=True)
class StepSync:
    """The result of the exchange, the same on all ranks.

    `slowest` gives (seconds, rank) by phase of the previous step: the longest time, or for phases of waiting the
    shortest; empty before the first step.
    """

    stop: signal.Signals | None
    profile: bool
    slowest: dict[str, tuple[float, int]] = field(default_factory=dict)


def synchronize_step(device: torch.device, stop: int, profile: bool, seconds: Mapping[str, float]) -> StepSync:
    """Collective over all ranks; `seconds` are this rank's times of the previous step, empty on all ranks before the
    first."""
    rank = dist.get_rank()
    times = [_packed(seconds[phase], rank) * _sign(phase) for phase in TIMED if seconds]
    vector = torch.tensor([stop, int(profile), *times], dtype=torch.int64, device=device)
    dist.all_reduce(vector, op=dist.ReduceOp.MAX)
    number, asked, *times = vector.tolist()
    slowest = {phase: _unpacked(time * _sign(phase)) for phase, time in zip(TIMED, times, strict=False)}
    return StepSync(signal.Signals(number) if number else None, bool(asked), slowest)


def _sign(phase: str) -> int:
    return -1 if phase in WAITING else 1


def _packed(seconds: float, rank: int) -> int:
    return (round(seconds * 1e6) << _RANK_BITS) | rank


def _unpacked(packed: int) -> tuple[float, int]:
    return (packed >> _RANK_BITS) / 1e6, packed & ((1 << _RANK_BITS) - 1)
