"""What a rank is doing, and how long each phase of a step takes.

Phases are reported by the engine (`engine.protocol.Around`) and by the run around it. On a GPU they are measured by
events on the stream, which are read after the step's loss, so that nothing waits for them.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from megatron.supervision.profiler import named
from megatron.supervision.status_store import Whereabouts

# In these a rank waits for others: the shortest time among ranks is that of the exchange itself. In all others the step
# waits for the longest.
WAITING = ("pipeline", "reduce")
TIMED = ("step", "data", "forward", "backward", "pipeline", "reduce", "optimizer")


class StepTimers:
    """Position and timers of this rank's main thread."""

    def __init__(self, whereabouts: Whereabouts, device: torch.device) -> None:
        self.whereabouts = whereabouts
        self._on_gpu = device.type == "cuda"
        self._timed = False  # in a training step
        self._spans: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Mark the main thread as being in `phase`; within a training step, also measure the time."""
        self.whereabouts.at(phase)
        if not self._timed:
            yield
            return
        start = self._now()
        with named(phase):
            yield
        self._spans.append((phase, start, self._now()))

    @contextlib.contextmanager
    def step(self, iteration: int, first: bool) -> Iterator[None]:
        """A training step. The first one may compile kernels, so the time limit of a step does not apply to it."""
        self._spans.clear()
        self._timed = True
        self.whereabouts.iteration, self.whereabouts.under_step_timeout = iteration, not first
        with self.during("step"):
            yield
        self._timed = self.whereabouts.under_step_timeout = False

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """An evaluation between steps, under the limit of a step."""
        self.whereabouts.under_step_timeout = True
        yield
        self.whereabouts.under_step_timeout = False

    @contextlib.contextmanager
    def without_step_limit(self, phase: str) -> Iterator[None]:
        """An operation with a time limit of its own, such as a save."""
        self.whereabouts.at(phase)
        yield
        self.whereabouts.at("between steps")

    def seconds(self) -> dict[str, float]:
        """Seconds of the last step by phase. Waits until the device has reached the end of the step."""
        sums: dict[str, float] = defaultdict(float)
        if self._spans and isinstance(last := self._spans[-1][2], torch.cuda.Event):
            last.synchronize()
        for phase, start, end in self._spans:
            if isinstance(start, torch.cuda.Event):
                assert isinstance(end, torch.cuda.Event)
                sums[phase] += start.elapsed_time(end) / 1e3
            else:
                assert isinstance(end, float)
                sums[phase] += end - start
        return {phase: sums[phase] for phase in TIMED}

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
