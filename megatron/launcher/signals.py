"""A signal to any rank becomes a decision of all ranks, taken between two steps.

Slurm warns a job before its time is up (SIGUSR1, `--signal`) and before it is cancelled or preempted (SIGTERM). One
rank that stopped at once would leave the others in a collective; so a signal is only noted, and after the step the
ranks ask each other. Then all of them save the same step and end with the code on which a batch script requeues.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOPPING = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Signals that have arrived at this rank, and whether any rank has one."""

    def __init__(self) -> None:
        self._received = 0

    def install(self) -> None:
        """Note SIGUSR1 and SIGTERM from here on instead of ending."""
        for number in STOPPING:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # `fork` holds back what came before

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def agreed(self, device: torch.device) -> signal.Signals | None:
        """The signal to stop for, the same on all ranks: None unless one has arrived at some rank. Collective."""
        highest = torch.tensor(self._received, dtype=torch.int32, device=device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return signal.Signals(int(highest)) if highest else None
