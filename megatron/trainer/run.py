"""A training run from its configuration to its last checkpoint: setup, step, between steps, end.

position -> data -> engine -> weights      `set_up`: where the run begins decides what is read and built
batch -> step -> guards                    `step`: one optimizer step, and what must be true of it
evaluate, save, agree                      `between_steps`: what happens at every step's end, and whether to stop
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megatron.checkpoint.load import load_checkpoint
from megatron.checkpoint.save import owned_save_folder
from megatron.checkpoint.start import find_start
from megatron.checkpoint.state import TrainState
from megatron.common.log import log_on_rank_0
from megatron.data.build import build_datasets
from megatron.data.sample import SampleDataset
from megatron.engine.batches import StepBatch
from megatron.engine.build import build_engine
from megatron.engine.nonfinite import SkipLimits, SuspiciousLossError, check_finite, report_skipped
from megatron.engine.protocol import StepResult
from megatron.evaluation.perplexity import Evaluation, evaluate_all
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import RankGroup
from megatron.parallel.place import Place
from megatron.parallel.process_groups import initialize
from megatron.supervision.replicas import ReplicasDifferError
from megatron.supervision.signals import StopRequest
from megatron.supervision.status_store import Whereabouts
from megatron.supervision.step_monitor import StepMonitor
from megatron.supervision.step_timers import StepTimers
from megatron.supervision.watchdog import Watchdog
from megatron.trainer.batches import TrainingBatches
from megatron.trainer.global_batch import keep_global_batch
from megatron.trainer.gpt_neox_log import evaluation_line, evaluation_scalars
from megatron.trainer.initial_loss import check_initial_loss, loss_of_predicting_the_mean
from megatron.trainer.metrics import Metrics, StartUpClock
from megatron.trainer.parameter_norms import parameter_norms
from megatron.trainer.saves import Saves
from megatron.trainer.schedule import Schedule, check_length, check_schedule
from megatron.trainer.start_record import start_record, write_start

logger = logging.getLogger(__name__)


def train(args: NeoXArgs) -> None:
    """Train to the configured length. Collective: every rank that was started calls it.

    Raises Stopped on all ranks, with everything saved, after SIGUSR1 or SIGTERM to one of them.
    """
    stop = StopRequest()
    stop.install()
    place = initialize(args)
    log_on_rank_0(place.rank)
    with Watchdog(args, place) as watchdog, owned_save_folder(RankGroup.world(place.device), args.save):
        Run(args, place, stop, watchdog.whereabouts).execute()


class Run:
    """A training run on this rank, in an initialized world. All methods are collective."""

    def __init__(
        self, args: NeoXArgs, place: Place, stop: StopRequest | None = None, whereabouts: Whereabouts | None = None
    ) -> None:
        log_on_rank_0(place.rank)
        self.args, self.place = args, place
        self.stop = stop or StopRequest()
        self.timers = StepTimers(whereabouts or Whereabouts(), place.device)
        self.startup = StartUpClock(self.timers.whereabouts)
        self.skip_limits = SkipLimits(args.max_skipped_steps_in_a_row, args.max_skipped_steps)

    def execute(self) -> None:
        """The whole run."""
        self.set_up()
        try:
            self.agree()
            while self.state.iteration < self.schedule.train_iters:
                self.step()
                self.between_steps()
                if self.is_interrupted():
                    break
        except (SuspiciousLossError, ReplicasDifferError):  # on all ranks; a save in flight is of an earlier state
            with self.timers.without_step_limit("save"):
                self.saves.finish()
            raise
        if self.state.iteration >= self.schedule.train_iters:
            self.test()
        self.end()

    # --- set up

    def set_up(self) -> None:
        """Find the position, open the data there, build the engine, load weights, and validate if the run begins."""
        self.startup.done("start, imports and groups")
        start = find_start(RankGroup.world(self.place.device), self.args)
        self.args = args = keep_global_batch(self.args, start)
        self.startup.done("position")

        datasets = build_datasets(
            args, iteration=start.position.iteration, consumed_samples=start.position.consumed_samples
        )
        for note in datasets.notes:
            logger.info(note)
        assert datasets.train_iters is not None  # checked with the configuration
        self.schedule = Schedule(args, datasets.train_iters)
        check_length(start.position.iteration, self.schedule.train_iters, args)
        check_schedule(self.schedule, start.position.iteration)
        self.validation, self.tests = datasets.valid, datasets.test
        self.metrics = Metrics(args, self.place.rank, self.schedule.train_iters)
        self.startup.done("data")

        self.engine = build_engine(args, self.place, self.timers.during)
        for line in self.engine.describe():
            logger.info(line)
        self.startup.done("engine")

        if start.checkpoint is None:
            self.engine.initialize_weights()
            self.state = TrainState()
        else:
            self.state = load_checkpoint(self.engine, args, start, data_fingerprints=datasets.fingerprints)
        self.startup.done("weights")
        logger.info(f"starting at iteration {self.state.iteration}, {self.state.consumed_samples} samples consumed")

        saved = self.state.iteration if start.own_save else None
        resumed = saved if start.restored != "weights" else None
        if self.place.rank == 0 and args.log_dir:
            write_start(args.log_dir, start_record(args, start, datasets, self.state, self.schedule.train_iters))

        self.saves = Saves(self.engine, args, self.schedule.train_iters, datasets.fingerprints, saved, resumed)
        self.first = self.state.iteration
        if self.first == 0:
            self.validate()
            self.saves.if_due(self.state)
        self.startup.done("validation")

        self.batches = TrainingBatches(args, self.place, datasets.train, self.state.consumed_samples)
        self.batches.announce_skipped_ranges()
        self.monitor = StepMonitor(self.engine, args, self.timers)
        self.metrics.start_clock(self.engine.counters)

    # --- step

    def step(self) -> None:
        """One optimizer step, timed, traced if requested, and with a comparison of replicas if one is due."""
        iteration = self.state.iteration + 1
        with self.monitor.profiler.step(iteration), self.timers.step(iteration, first=iteration == self.first + 1):
            self.train_step()
        self.monitor.after_step(iteration, saving=self.saves.is_due(iteration))

    def train_step(self) -> None:
        """Batch, engine, guards, log; the state moves on by one iteration.

        If the loss or the gradient is not finite the update is skipped, up to a limit; the data move on regardless.
        """
        state, iteration = self.state, self.state.iteration + 1
        # As in GPT-NeoX, a step that overflowed does not advance the schedule.
        rate = self.schedule.learning_rate(state.iteration - self.engine.counters.overflows)
        self.engine.set_learning_rate(rate)
        batch = self.batches.next(iteration, self.timers)
        result = self.engine.train_step(batch)
        samples = self.batches.advance()
        self.judge(result, iteration, samples, batch)
        state.iteration, state.consumed_samples = iteration, samples[1]
        self.metrics.step(state, result, rate, batch.learned_tokens, self.engine.counters)
        if self.args.log_param_norm and iteration % self.args.log_interval == 0:
            self.metrics.record(iteration, parameter_norms(self.engine, self.args.whole_shape))

    def judge(self, result: StepResult, iteration: int, samples: tuple[int, int], batch: StepBatch) -> None:
        """Count a skipped step; stop a run whose loss cannot be right. Raises SuspiciousLossError on all ranks."""
        if result.overflow:
            logger.info(
                f"iteration {iteration}: fp16 gradients overflow at loss scale {result.loss_scale:g}; the update is "
                f"skipped, {self.engine.counters.overflows} so far"
            )
            return
        if not result.applied:
            self.state.skipped_in_a_row += 1
            logger.warning(
                report_skipped(
                    result,
                    self.place,
                    iteration,
                    samples,
                    in_a_row=self.state.skipped_in_a_row,
                    total=self.engine.counters.not_finite,
                    limits=self.skip_limits,
                )
            )
            return
        check_finite(result, iteration)
        if iteration == 1:
            images = self.args.reads_images
            of_the_mean = loss_of_predicting_the_mean(self.args, batch, self.place) if images else None
            check_initial_loss(result.loss, self.args, of_the_mean)
        self.state.skipped_in_a_row = 0

    # --- between steps

    def between_steps(self) -> None:
        """Evaluate and save if due, then agree on whether to continue."""
        state, args = self.state, self.args
        with self.metrics.off_the_clock():
            if state.iteration == self.first + 1:
                self.startup.done("first step")
                logger.info(self.startup.line())
            if args.eval_interval and state.iteration % args.eval_interval == 0:
                with self.timers.evaluation():
                    self.validate()
            with self.timers.without_step_limit("save"):
                self.saves.if_due(state)
        self.agree()

    def is_interrupted(self) -> bool:
        """Whether `exit_interval` ends the run here, with everything saved. Collective."""
        every, iteration = self.args.exit_interval, self.state.iteration
        if not every or iteration % every or iteration >= self.schedule.train_iters:
            return False
        if self.args.save:
            with self.timers.without_step_limit("save"):
                self.saves.now(self.state)
        logger.info(f"exit_interval {every}: the run ends at iteration {iteration} of {self.schedule.train_iters}")
        return True

    def agree(self) -> None:
        """Exchange step times, requests for profiles and signals; stop on all ranks if any received a signal.

        Raises Stopped after everything is saved; a run that is at its end just ends.
        """
        state = self.state
        sync = self.monitor.between_steps(self.stop.received, state.iteration)
        self.metrics.record_timers(state.iteration, sync.slowest)
        if sync.stop is not None and state.iteration < self.schedule.train_iters:
            with self.timers.without_step_limit("save"):
                self.saves.stop(sync.stop, state)

    def validate(self) -> None:
        """Validation loss of every source: what a continued run learns of its domain and forgets of the rest."""
        self.evaluate("validation", self.validation, self.args.valid_data_weights)

    def evaluate(self, kind: str, datasets: Mapping[str, SampleDataset], weights: list[float] | None) -> None:
        """Log and record the losses of `datasets`, each under its name and as their weighted mean."""
        iteration, samples = self.state.iteration, self.args.eval_iters * self.args.train_batch_size
        results = evaluate_all(self.engine, self.args, datasets, samples)
        for name, result in results.items():
            logger.info(f"{kind} at iteration {iteration} | {name} | {result.text(self.args, digits=4)}")
            self.metrics.record(iteration, evaluation_scalars(self.args, result, f"{kind}/{name}/"))
        if results:  # over all sources by their weights, as GPT-NeoX blends them
            weights = weights or [1.0] * len(results)
            losses = [result.loss for result in results.values()]
            blended = Evaluation(sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights), 0, 0)
            scalars = evaluation_scalars(self.args, blended, "")
            logger.info(evaluation_line(kind, iteration, scalars))
            self.metrics.record(iteration, {f"{kind}/{name}": value for name, value in scalars.items()})

    # --- end

    def test(self) -> None:
        """Loss of the test sources, once, by the trained model."""
        with self.metrics.off_the_clock(), self.timers.evaluation():
            self.evaluate("test", self.tests, self.args.test_data_weights)

    def end(self) -> None:
        """Flush and close all outputs."""
        self.monitor.profiler.close()
        self.metrics.close()
