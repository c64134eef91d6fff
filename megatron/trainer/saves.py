"""The checkpoints of a run: when they are due, how they are written, and whether the present state is in one."""

from __future__ import annotations

from signal import Signals

from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.checkpoint import BackgroundSaver, TrainState, save_checkpoint
from megatron.data.build import Datasets
from megatron.neox_arguments import NeoXArgs
from megatron.supervision.failures import Stopped
from megatron.trainer.metrics import Progress


class Saves:
    """With `async_save` those in the middle of a run are written beside it; the last one is always waited for."""

    def __init__(
        self, engine: PipelineEngine, args: NeoXArgs, datasets: Datasets, progress: Progress, saved: int | None
    ) -> None:
        """`saved` is the iteration that `args.save` holds. Collective with `async_save`."""
        self.engine, self.args, self.datasets, self.progress = engine, args, datasets, progress
        self.saved = saved
        self.background: BackgroundSaver | None = None
        if args.save and args.async_save:
            self.background = BackgroundSaver(
                engine, args, datasets.fingerprints, saved, log=progress.say, warn=progress.warn
            )
            self.background.prepare()

    def if_due(self, state: TrainState) -> None:
        """After every step: take note of what was written since, and save if it is time. Collective."""
        if self.background is not None:
            self.background.poll()
        if not is_save_point(self.args, state.iteration):
            return
        if self.background is None or state.iteration == self.args.train_iters:
            self.now(state)
        elif state.iteration != self.background.completed:
            self.background.begin(state)

    def now(self, state: TrainState) -> None:
        """Save unless this state is saved already; when it returns, the checkpoint is complete. Collective.

        A save in flight is finished before. CheckpointError if this one fails; that of a save in flight is reported.
        """
        self.finish()
        if state.iteration != self.saved:
            fingerprints = self.datasets.fingerprints
            save_checkpoint(self.engine, self.args, state, data_fingerprints=fingerprints, log=self.progress.say)
            self.saved = state.iteration
            if self.background is not None:
                self.background.completed = state.iteration

    def finish(self) -> None:
        """Wait for a save in flight. Collective."""
        if self.background is not None:
            self.background.wait()
            self.saved = self.background.completed


def stop_if_asked(received: Signals | None, saves: Saves, state: TrainState) -> None:
    """After a signal to any rank: save what is not saved yet, then raise Stopped on all ranks. Collective.

    Without a save folder there is nothing to go on with, and the exit code is the signal's.
    """
    args = saves.args
    if received is None:
        return
    where = f"{received.name} at iteration {state.iteration} of {args.train_iters}"
    if not args.save:
        raise Stopped(f"{where}; nothing is saved, the run has no save folder", code=128 + received)
    saves.now(state)
    raise Stopped(f"{where}; all is saved, the same command goes on from there")


def is_save_point(args: NeoXArgs, iteration: int) -> bool:
    """Every `checkpoint_factor` iterations, at the `extra_save_iters` (0: before the first step), and at the end."""
    if not args.save:
        return False
    every = args.checkpoint_factor and iteration and iteration % args.checkpoint_factor == 0
    return bool(every or iteration in (args.extra_save_iters or ()) or iteration == args.train_iters)
