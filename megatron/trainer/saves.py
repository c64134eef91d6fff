"""The checkpoints of a run: when they are due, how they are written, and whether the current state is saved."""

from __future__ import annotations

from collections.abc import Mapping
from signal import Signals
from typing import Any

from megatron.checkpoint.background import BackgroundSaver
from megatron.checkpoint.save import prepare_save, save_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.engine.protocol import Engine
from megatron.neox_arguments import NeoXArgs
from megatron.supervision.failures import Stopped
from megatron.supervision.signals import signal_name


class Saves:
    """The saves of a run. With `async_save` all but the last are written in the background."""

    def __init__(
        self,
        engine: Engine,
        args: NeoXArgs,
        train_iters: int,
        data_fingerprints: Mapping[str, Any],
        saved: int | None,
        resumed: int | None = None,
    ) -> None:
        """`saved` is the iteration that `args.save` holds, `resumed` the one in it that the run continues from.

        Collective if the run saves.
        """
        self.engine, self.args, self.train_iters = engine, args, train_iters
        self.data_fingerprints, self.saved = data_fingerprints, saved
        self.background: BackgroundSaver | None = None
        if args.save:
            prepare_save(engine, args, resumed)
        if args.save and args.async_save:
            self.background = BackgroundSaver(engine, args, data_fingerprints, saved)
            self.background.prepare()

    def is_due(self, iteration: int) -> bool:
        return is_save_point(self.args, iteration, self.train_iters)

    def if_due(self, state: TrainState) -> None:
        """After every step: register finished background saves, and save if one is due. Collective."""
        if self.background is not None:
            self.background.poll()
        if not self.is_due(state.iteration):
            return
        if self.background is None or state.iteration == self.train_iters:
            self.now(state)
        elif state.iteration != self.background.completed:
            self.background.begin(state)

    def now(self, state: TrainState) -> None:
        """Save unless this state is saved already; when it returns, the checkpoint is complete. Collective.

        A save in flight is finished first. CheckpointError if this one fails; an error of the save in flight is only
        reported.
        """
        self.finish()
        if state.iteration != self.saved:
            save_checkpoint(self.engine, self.args, state, data_fingerprints=self.data_fingerprints)
            self.saved = state.iteration
            if self.background is not None:
                self.background.completed = state.iteration

    def finish(self) -> None:
        """Wait for a save in flight. Collective."""
        if self.background is not None:
            self.background.wait()
            self.saved = self.background.completed

    def stop(self, received: Signals, state: TrainState) -> None:
        """After a signal to any rank: save what is not saved yet, then raise Stopped on all ranks. Collective.

        Without a save folder there is nothing to resume from, and the exit code is the signal's.
        """
        where = f"{signal_name(received)} at iteration {state.iteration} of {self.train_iters}"
        if not self.args.save:
            raise Stopped(f"{where}; nothing is saved, the run has no save folder", code=128 + received)
        self.now(state)
        raise Stopped(f"{where}; all is saved, the same command goes on from there")


def is_save_point(args: NeoXArgs, iteration: int, train_iters: int) -> bool:
    """Every `checkpoint_factor` iterations or at its powers, at `extra_save_iters` (0: at the start), at the end."""
    if not args.save:
        return False
    factor = args.checkpoint_factor
    if args.checkpoint_scale == "log":
        every = factor is not None and _is_power(iteration, factor)
    else:
        every = factor is not None and iteration > 0 and iteration % factor == 0
    return bool(every or iteration in (args.extra_save_iters or ()) or iteration == train_iters)


def _is_power(iteration: int, factor: float) -> bool:
    """Whether `iteration` is a power of `factor`, rounded down: 1, 2, 4 of 2; 1, 2, 3, 5 of 1.5."""
    power = 1.0
    while int(power) < iteration:
        power *= factor
    return int(power) == iteration
