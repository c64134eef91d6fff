"""Runs a program on rank 0 that uses a checkpoint's model: the common part of eval.py, mcq.py and embed.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron.checkpoint.load import load_weights
from megatron.common.log import log_on_rank_0
from megatron.engine.build import build_inference_engine
from megatron.evaluation.driver import DrivenModel, drive
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.process_groups import initialize
from megatron.supervision.step_timers import StepTimers
from megatron.supervision.watchdog import Watchdog

T = TypeVar("T")


def with_checkpoint(args: NeoXArgs, program: Callable[[DrivenModel, Path], T]) -> T | None:
    """Load the model and run `program(model, checkpoint folder)` on rank 0; its result, None on the other ranks."""

    def with_folder(model: DrivenModel, folder: Path | None) -> T:
        assert folder is not None  # guaranteed by the rule weights_are_given
        return program(model, folder)

    return with_model(args, with_folder)


def with_model(args: NeoXArgs, program: Callable[[DrivenModel, Path | None], T]) -> T | None:
    """Like `with_checkpoint`, but without `load` use the initial model of a `from_scratch` training, and no folder."""
    place = initialize(args)
    log_on_rank_0(place.rank)
    with Watchdog(args, place) as watchdog:
        # The watchdog counts the engine's phases as progress.
        engine = build_inference_engine(args, place, StepTimers(watchdog.whereabouts, place.device).during)
        folder = None
        if args.load is None and args.from_scratch:
            engine.initialize_weights()
        else:
            folder = load_weights(engine, args)
        return drive(engine, args, watchdog.whereabouts, lambda model: program(model, folder))
