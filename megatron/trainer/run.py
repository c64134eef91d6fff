"""A whole run: build, load, then step, evaluate and save until the last iteration."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.checkpoint import TrainState, load_checkpoint, prepare_save
from megatron.data.build import Datasets, build_datasets
from megatron.data.sampler import MicroBatches
from megatron.data.skip_ranges import SampleRanges
from megatron.engine.deepspeed import build_engine, build_model
from megatron.engine.deepspeed_hooks import run_inside
from megatron.evaluation.perplexity import evaluate_all
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.process_groups import Place, initialize
from megatron.supervision.replicas import ReplicasDifferError
from megatron.supervision.signals import StopRequest
from megatron.supervision.status_store import Whereabouts
from megatron.supervision.step_monitor import Watch
from megatron.supervision.step_timers import Phases
from megatron.supervision.watchdog import Watchdog
from megatron.trainer.batches import MicroBatch, StepBatch, assemble
from megatron.trainer.learning_rate import learning_rate
from megatron.trainer.metrics import Progress
from megatron.trainer.nonfinite import SuspiciousLossError, check_finite, check_initial_loss
from megatron.trainer.resume import is_own_save, where_to_start
from megatron.trainer.saves import Saves, is_save_point, stop_if_asked
from megatron.trainer.skips import announce, count_skipped, crossed, was_skipped
from megatron.trainer.startup import StartUp


def train(args: NeoXArgs) -> None:
    """Train to `args.train_iters`. Collective: every rank that was started calls it.

    Raises Stopped on all ranks, everything saved, after SIGUSR1 or SIGTERM to one of them.
    """
    stop = StopRequest()
    stop.install()
    place = initialize(args)
    with Watchdog(args, place) as watchdog:
        run_training(args, place, stop, watchdog.whereabouts)


def run_training(
    args: NeoXArgs, place: Place, stop: StopRequest | None = None, whereabouts: Whereabouts | None = None
) -> None:
    """`train` in a world that is initialised already."""
    stop, phases = stop or StopRequest(), Phases(whereabouts or Whereabouts(), place.device)
    startup = StartUp(phases.whereabouts)
    startup.done("start, imports and groups")
    progress = Progress(args, place.rank)
    datasets = build_datasets(args)
    for note in datasets.notes:
        progress.say(note)
    if args.train_iters is None:
        assert datasets.train_iters is not None  # checked with the configuration
        args = progress.args = args.with_train_iters(datasets.train_iters)
    startup.done("data")
    start = where_to_start(args, place.device, progress.say)
    model = build_model(args, place.device, progress.say)
    if start.from_scratch:
        model.initialise_from_scratch()
    startup.done("model")
    engine = build_engine(args, model, progress.say)
    run_inside(engine, phases.during)
    startup.done("engine")
    state = load_checkpoint(engine, start, data_fingerprints=datasets.fingerprints, log=progress.say) or TrainState()
    if args.save:
        prepare_save(engine, args, log=progress.say)
    datasets = long_enough(args, datasets, state)
    startup.done("checkpoint")
    progress.say(f"starting at iteration {state.iteration}, {state.consumed_samples} samples consumed")
    first = state.iteration
    saves = Saves(engine, args, datasets, progress, first if is_own_save(start) else None)
    if first == 0:
        report_validation(engine, args, datasets, progress, 0)
        saves.if_due(state)
    startup.done("validation")
    batches = TrainingBatches(engine, args, datasets, state)
    announce(batches.skip, state.consumed_samples, progress.say)
    progress.start_clock()
    watch = Watch(engine, args, place, phases, progress)
    while state.iteration < args.train_iters:
        try:
            pulse = watch.between_steps(stop.received, state.iteration)
            with phases.unhurried("save"):
                stop_if_asked(pulse.stop, saves, state)
            with watch.profiler.step(state.iteration + 1), phases.step(state.iteration + 1, state.iteration == first):
                train_step(engine, args, batches, state, progress, phases)
            watch.after_step(state.iteration, is_save_point(args, state.iteration))
        except (SuspiciousLossError, ReplicasDifferError):  # on all ranks; what is being written is from before
            with phases.unhurried("save"):
                saves.finish()
            raise
        with progress.off_the_clock():
            if state.iteration == first + 1:
                startup.done("first step")
                progress.say(startup.line())
            if args.eval_interval and state.iteration % args.eval_interval == 0:
                with phases.evaluation():
                    report_validation(engine, args, datasets, progress, state.iteration)
            with phases.unhurried("save"):
                saves.if_due(state)
    watch.profiler.close()
    progress.close()


class TrainingBatches:
    """The batches of training from a position on; stages without data only take part in the count."""

    def __init__(self, engine: PipelineEngine, args: NeoXArgs, datasets: Datasets, state: TrainState) -> None:
        self.engine, self.args, self.skip = engine, args, SampleRanges(args.skip_sample_ranges)
        self._micro_batches: Iterator[MicroBatch] | None = None
        if engine.is_first_stage() or engine.is_last_stage():
            self._micro_batches = iter(
                MicroBatches(
                    datasets.train,
                    micro_batch=args.train_micro_batch_size_per_gpu,
                    dp_rank=engine.grid.data_parallel_id,
                    dp_size=args.data_parallel_size,
                    accumulation=args.gradient_accumulation_steps,
                    consumed_samples=state.consumed_samples,
                    skip=self.skip,
                )
            )

    def next(self, iteration: int, phases: Phases) -> StepBatch:
        accumulation, source = self.args.gradient_accumulation_steps, self._micro_batches
        with phases.during("data"):
            micro_batches = None if source is None else [next(source) for _ in range(accumulation)]
        return assemble(
            micro_batches,
            accumulation,
            self.args.data_parallel_size,
            counts_tokens=self.engine.is_last_stage() and self.engine.grid.get_slice_parallel_rank() == 0,
            device=self.engine.device,
            what=f"training step {iteration}",
        )


def train_step(
    engine: PipelineEngine,
    args: NeoXArgs,
    batches: TrainingBatches,
    state: TrainState,
    progress: Progress,
    phases: Phases,
) -> float:
    """One optimizer step; returns the global mean loss. `state` moves on by one iteration.

    Where the loss or the gradient is not finite the update is skipped, up to a bound; the data move on all the same.
    """
    rate = learning_rate(args, state.iteration)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    batch = batches.next(state.iteration + 1, phases)
    mean_loss = engine.train_batch(batch.iterator)
    phases.whereabouts.at("result")  # where a GPU's host waits for the step
    loss = float(mean_loss)
    grad_norm = float(engine.get_global_grad_norm())
    behind = batches.skip.after(state.consumed_samples, args.train_batch_size)
    if was_skipped(engine):
        progress.warn(count_skipped(engine, args, state, loss, (state.consumed_samples, behind)))
    else:
        check_finite(loss, grad_norm, state.iteration + 1)
        if state.iteration == 0:
            check_initial_loss(loss, args)
        state.skipped_in_a_row = 0
    for line in crossed(batches.skip, state.consumed_samples, behind):
        progress.say(line)
    state.iteration += 1
    state.consumed_samples = behind
    progress.step(state, loss, rate, grad_norm, batch.learned_tokens, engine.skipped_steps)
    return loss


def long_enough(args: NeoXArgs, datasets: Datasets, state: TrainState) -> Datasets:
    """`datasets`, or the same with a longer order if the run reads on beyond it.

    So it does when it is behind where its iteration alone would put it: it has left out samples, or had a larger batch,
    of which the present configuration does not know.
    """
    ranges, left = SampleRanges(args.skip_sample_ranges), max(0, args.train_iters - state.iteration)
    end = ranges.after(state.consumed_samples, left * args.train_batch_size)
    return datasets if end <= len(datasets.train) else build_datasets(args, samples=end)


def report_validation(
    engine: PipelineEngine, args: NeoXArgs, datasets: Datasets, progress: Progress, iteration: int
) -> None:
    """Validation loss of every source: what a continued run learns of its domain and forgets of the rest."""
    for name, result in evaluate_all(engine, args, datasets.valid, args.eval_iters * args.train_batch_size).items():
        progress.say(
            f"validation at iteration {iteration} | {name} | loss {result.loss:.4f} | "
            f"perplexity {result.perplexity:.2f} | {result.learned_tokens} tokens"
        )
        progress.record(
            iteration,
            {f"validation/{name}/lm_loss": result.loss, f"validation/{name}/lm_loss_ppl": result.perplexity},
        )
