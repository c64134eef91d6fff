"""What the ranks tell each other between two steps, and what is said of it."""

from __future__ import annotations

from megatron.launcher.distributed import Place
from megatron.launcher.heartbeat import gather_titles
from megatron.neox_arguments import NeoXArgs
from megatron.trainer.drift import StepTimes
from megatron.trainer.phases import Phases
from megatron.trainer.progress import Progress
from megatron.trainer.pulse import Pulse, exchange


class Watch:
    """The observers of a run's steps. Collective to make."""

    def __init__(self, args: NeoXArgs, place: Place, phases: Phases, progress: Progress) -> None:
        self.place, self.phases, self.progress = place, phases, progress
        self._titles = gather_titles(place)
        self._times = StepTimes(args.slow_step_factor, args.step_time_drift, self.name)
        self._first: int | None = None

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self._titles[rank]}"

    def between_steps(self, stop: int, iteration: int) -> Pulse:
        """Exchange the pulse after `iteration` steps; rank 0 says what is odd about the last one. Collective.

        The times of a run's first step are left out: it compiles, allocates and connects.
        """
        self._first = iteration if self._first is None else self._first
        self.phases.whereabouts.at("agreement")
        seconds = self.phases.seconds() if iteration > self._first + 1 else {}
        pulse = exchange(self.place.device, stop, False, seconds)
        if pulse.slowest and self.progress.active:
            for line in self._times.add(iteration, pulse.slowest):
                self.progress.warn(line)
            self.progress.record(iteration, {f"timers/{phase}": time for phase, (time, _) in pulse.slowest.items()})
        return pulse
