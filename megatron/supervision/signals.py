"""A signal to any rank becomes a decision of all ranks, taken between two steps.

Slurm warns a job before its time is up (SIGUSR1, `--signal`) and before it is cancelled or preempted (SIGTERM). One
rank that stopped at once would leave the others in a collective; so a signal is only noted, and after the step the
ranks ask each other (`trainer.pulse`). Then all of them save the same step and end with the code on which a batch
script requeues.
"""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """The first signal that has arrived at this rank; `received` is its number, 0 if none has."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        """Note SIGUSR1 and SIGTERM from here on instead of ending."""
        for number in STOPPING:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # `fork` holds back what came before

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
