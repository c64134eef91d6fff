"""The cost of saves and failures, and the days and node-hours for a number of tokens.

reliability(estimate) -> Reliability
budget(estimate, tokens) -> Budget
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.planner.cost.estimate import Estimate


@dataclass(frozen=True)
class Reliability:
    """The cost of saves and failures in seconds; shares refer to the total time."""

    mean_time_to_interrupt: float  # of the whole job: an assumption, see `Machine.node_mtbf_seconds`
    save_seconds: float
    save_interval: float  # the interval that loses least (Young 1974, Daly 2006, first order): sqrt(2 save interrupt)
    lost_to_saves: float  # shares
    lost_to_failures: float  # half an interval of repeated work, and the restart

    @property
    def useful(self) -> float:
        return 1.0 / (1.0 + self.lost_to_saves + self.lost_to_failures)


@dataclass(frozen=True)
class Budget:
    """A number of tokens, in time on the machine."""

    tokens: float
    steps: int
    days: float  # saves and failures included
    node_hours: float


def reliability(estimate: Estimate, blocked_seconds: float | None = None) -> Reliability:
    """`blocked_seconds` is how long a save stops training: all of the write unless it is asynchronous.

    Saves do not come faster than they are written, one being in flight at a time.
    """
    machine = estimate.machine
    interrupt = machine.node_mtbf_seconds / estimate.nodes
    save = estimate.checkpoint_seconds if blocked_seconds is None else blocked_seconds
    interval = max(math.sqrt(2.0 * save * interrupt), estimate.checkpoint_seconds)
    return Reliability(
        mean_time_to_interrupt=interrupt,
        save_seconds=save,
        save_interval=interval,
        lost_to_saves=save / interval,
        lost_to_failures=(interval / 2.0 + machine.restart_seconds) / interrupt,
    )


def budget(estimate: Estimate, tokens: float, blocked_seconds: float | None = None) -> Budget:
    """Time for `tokens` tokens, with what saves and failures take; `blocked_seconds` as for `reliability`."""
    steps = math.ceil(tokens / estimate.tokens_per_step)
    seconds = steps * estimate.step_seconds / reliability(estimate, blocked_seconds).useful
    return Budget(tokens, steps, seconds / 86_400, seconds / 3600 * estimate.nodes)
