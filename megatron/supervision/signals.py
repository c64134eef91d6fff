"""A signal to any rank becomes a decision of all ranks, taken between two steps.

Slurm warns a job before its time limit (SIGUSR1, `--signal`) and before it is cancelled or preempted (SIGTERM); a user
presses Ctrl-C (SIGINT). A rank that stopped at once would leave the others in a collective, so a signal is only
recorded, and the ranks agree on it after the step (`step_sync`). Then all of them save the same step and end with the
exit code that makes a batch script requeue.
"""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def signal_name(number: int) -> str:
    """`SIGTERM`, `SIGUSR1`, ..., and `Ctrl-C` for SIGINT."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopRequest:
    """The first stop signal that arrived at this rank: `received` is its number, 0 if none has arrived."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        """From here on record SIGUSR1, SIGTERM and SIGINT instead of ending."""
        for number in STOPPING:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # the launchers block earlier ones until now

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
