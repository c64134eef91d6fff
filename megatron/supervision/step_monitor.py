"""Monitoring of a run's steps: the exchange between two steps, step times, comparison of replicas, profiles."""

from __future__ import annotations

import logging
from functools import partial

from megatron.engine.protocol import Engine
from megatron.neox_arguments import NeoXArgs
from megatron.supervision.profiler import Profiler
from megatron.supervision.replicas import Replicas
from megatron.supervision.status_store import gather_titles, titled
from megatron.supervision.step_sync import StepSync, synchronize_step
from megatron.supervision.step_time_monitor import StepTimes
from megatron.supervision.step_timers import StepTimers

logger = logging.getLogger(__name__)


class StepMonitor:
    """The monitors of a run's steps. Construction is collective."""

    def __init__(self, engine: Engine, args: NeoXArgs, timers: StepTimers) -> None:
        self.args, self.place, self.timers = args, engine.place, timers
        titles = gather_titles(self.place)
        self.profiler = Profiler(args, self.place)
        self._times = StepTimes(args.slow_step_factor, args.step_time_drift, partial(titled, titles=titles))
        self._replicas = Replicas(engine, args, titles)
        self._first: int | None = None

    def between_steps(self, stop: int, iteration: int) -> StepSync:
        """Exchange what the ranks must agree on after `iteration` steps; report anomalies of the last one.

        Collective. The times of a run's first step, which compiles, allocates and connects, are ignored.
        """
        self._first = iteration if self._first is None else self._first
        self.timers.whereabouts.at("agreement")
        seconds = self.timers.seconds() if iteration > self._first + 1 else {}
        sync = synchronize_step(self.place.device, stop, self.profiler.wanted(), seconds)
        if sync.profile:
            self.profiler.take(iteration + 1)
        if sync.stop:  # before this state is saved
            self.check_replicas(iteration)
            self.profiler.close()
        if sync.slowest and self.place.rank == 0:
            for line in self._times.add(iteration, sync.slowest):
                logger.warning(line)
        return sync

    def after_step(self, iteration: int, saving: bool) -> None:
        """Compare replicated parameters if a check is due, or the state is about to be saved. Collective."""
        if saving or (self.args.replica_check_interval and iteration % self.args.replica_check_interval == 0):
            self.check_replicas(iteration)

    def check_replicas(self, iteration: int) -> None:
        """Raise ReplicasDifferError on all ranks if replicated parameters have diverged; 0 switches the check off."""
        if self.args.replica_check_interval:
            self.timers.whereabouts.at("comparison of replicas")
            self._replicas.check(iteration)
