"""Detection of slow steps and gradual slowdowns: a step far above the running median, and medians that grow over time.

Only the slow rank itself computes longer; all others wait for it in the exchanges. That is why the series hold the
longest computation and the shortest exchange among ranks (`step_sync`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from statistics import median

from megatron.supervision.step_timers import WAITING

WINDOW = 20  # steps in each of the windows whose medians are compared
QUIET = 50  # steps after a report of a slow one in which others are only counted
MEMORY = 50  # steps in the running median
Times = Mapping[str, tuple[float, int]]  # phase -> (seconds, rank); "step" is the whole


class StepTimes:
    """Takes the times of every step and returns what to report. 0 turns a check off. `name(rank)` includes the node."""

    def __init__(self, slow_factor: float, drift_factor: float, name: Callable[[int], str]) -> None:
        self.slow_factor, self.drift_factor, self.name = slow_factor, drift_factor, name
        self._recent: deque[Times] = deque(maxlen=MEMORY)
        self._window: list[Times] = []
        self._best: dict[str, float] | None = None
        self._best_steps = ""
        self._quiet_until, self._held = 0, 0
        self._told = 1.0  # the last growth reported

    def add(self, iteration: int, times: Times) -> list[str]:
        """Add the `times` of the step that ended with `iteration`; returns lines to report."""
        lines = self._at_most_one(iteration, self._slow(iteration, times)) + self._creeping(iteration, times)
        self._recent.append(times)
        return lines

    def _at_most_one(self, iteration: int, lines: list[str]) -> list[str]:
        """The first slow step is reported at once; those among the next QUIET steps are counted and reported
        afterwards."""
        if iteration < self._quiet_until:
            self._held += len(lines)
            return []
        if self._held:
            first = self._quiet_until - QUIET + 1
            lines = [f"{self._held} more slow steps in iterations {first} to {iteration - 1}", *lines]
            self._held = 0
        if lines:
            self._quiet_until = iteration + QUIET
        return lines

    def _slow(self, iteration: int, times: Times) -> list[str]:
        if not self.slow_factor or len(self._recent) < 10:
            return []
        usual = {phase: median(step[phase][0] for step in self._recent) for phase in times}
        seconds = times["step"][0]
        if seconds <= self.slow_factor * usual["step"]:
            return []
        phase = _grown(usual, {phase: time for phase, (time, _) in times.items()})
        return [
            f"iteration {iteration} took {seconds:.3g} s, {seconds / usual['step']:.2f} x the running median: {phase} "
            f"{times[phase][0]:.3g} s instead of {usual[phase]:.3g} s, {self._whose(phase, times[phase][1])}"
        ]

    def _creeping(self, iteration: int, times: Times) -> list[str]:
        self._window.append(times)
        if not self.drift_factor or len(self._window) < WINDOW:
            return []
        window, self._window = self._window, []
        now = {phase: median(step[phase][0] for step in window) for phase in times}
        steps = f"iterations {iteration - WINDOW + 1} to {iteration}"
        if self._best is None or now["step"] < self._best["step"]:
            self._best, self._best_steps = now, steps
            return []
        growth = now["step"] / self._best["step"]
        if growth <= self.drift_factor * self._told:
            return []
        self._told = growth
        phase = _grown(self._best, now)
        rank, _ = Counter(step[phase][1] for step in window).most_common(1)[0]
        return [
            f"step time creeps up: {now['step']:.3g} s in {steps}, {self._best['step']:.3g} s in {self._best_steps} "
            f"({growth - 1:+.0%}); {phase} takes {now[phase]:.3g} s instead of {self._best[phase]:.3g} s, "
            f"{self._whose(phase, rank)}"
        ]

    def _whose(self, phase: str, rank: int) -> str:
        return "on all ranks at once" if phase in WAITING else f"longest on {self.name(rank)}"


def _grown(before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """The phase that takes most of the additional time."""
    return max((phase for phase in now if phase != "step"), key=lambda phase: now[phase] - before[phase])
