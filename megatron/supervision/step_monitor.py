"""What the ranks tell each other between two steps, and what is said of it."""

from __future__ import annotations

from functools import partial

from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.neox_arguments import NeoXArgs
from megatron.parallel.process_groups import Place
from megatron.supervision.profiler import Profiler
from megatron.supervision.replicas import Replicas
from megatron.supervision.status_store import gather_titles, titled
from megatron.supervision.step_sync import Pulse, exchange
from megatron.supervision.step_time_monitor import StepTimes
from megatron.supervision.step_timers import Phases
from megatron.trainer.metrics import Progress


class Watch:
    """The observers of a run's steps. Collective to make."""

    def __init__(
        self, engine: PipelineEngine, args: NeoXArgs, place: Place, phases: Phases, progress: Progress
    ) -> None:
        self.args, self.place, self.phases, self.progress = args, place, phases, progress
        titles = gather_titles(place)
        self.profiler = Profiler(args, place, progress.say, progress.warn)
        self._times = StepTimes(args.slow_step_factor, args.step_time_drift, partial(titled, titles=titles))
        self._replicas = Replicas(engine, args, titles)
        self._first: int | None = None

    def between_steps(self, stop: int, iteration: int) -> Pulse:
        """Exchange the pulse after `iteration` steps; rank 0 says what is odd about the last one. Collective.

        The times of a run's first step are left out: it compiles, allocates and connects.
        """
        self._first = iteration if self._first is None else self._first
        self.phases.whereabouts.at("agreement")
        seconds = self.phases.seconds() if iteration > self._first + 1 else {}
        pulse = exchange(self.place.device, stop, self.profiler.wanted(), seconds)
        if pulse.profile:
            self.profiler.take(iteration + 1)
        if pulse.stop:  # before this state is saved
            self.check_replicas(iteration)
            self.profiler.close()
        if pulse.slowest and self.progress.active:
            for line in self._times.add(iteration, pulse.slowest):
                self.progress.warn(line)
            self.progress.record(iteration, {f"timers/{phase}": time for phase, (time, _) in pulse.slowest.items()})
        return pulse

    def after_step(self, iteration: int, saving: bool) -> None:
        """Compare replicated parameters where it is time to, or the state is about to be saved. Collective."""
        if saving or (self.args.replica_check_interval and iteration % self.args.replica_check_interval == 0):
            self.check_replicas(iteration)

    def check_replicas(self, iteration: int) -> None:
        if self.args.replica_check_interval:
            self.phases.whereabouts.at("comparison of replicas")
            self._replicas.check(iteration)
