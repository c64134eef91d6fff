"""Builds the engine that the configuration asks for. DeepSpeed is imported only if it is that engine."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from megatron.engine.protocol import Around, Engine, PipelineStage, no_phases

if TYPE_CHECKING:
    from megatron.engine.mcore import MegatronEngine
    from megatron.neox_arguments import NeoXArgs
    from megatron.parallel.place import Place


def build_engine(args: NeoXArgs, place: Place, around: Around = no_phases) -> Engine:
    """Build the engine of a training run, with uninitialized weights. Collective."""
    if args.engine == "megatron":
        return _megatron_engine().for_training(args, place, around)
    from megatron.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine.for_training(args, place, around)


def build_inference_engine(args: NeoXArgs, place: Place, around: Around = no_phases) -> Engine:
    """Build an engine without an optimizer, for evaluation and generation. Collective."""
    if args.engine == "megatron":
        return _megatron_engine().for_inference(args, place, around)
    from megatron.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine.for_inference(args, place, around)


def _megatron_engine() -> type[MegatronEngine]:
    """The class, imported without megatron-core's warnings about packages that are not installed."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    from megatron.engine.mcore import MegatronEngine

    return MegatronEngine


def build_stage(args: NeoXArgs, place: Place) -> PipelineStage:
    """Build only this rank's part of the model, on `place.device`; the "meta" device takes no memory. Collective."""
    if args.engine == "megatron":
        return _megatron_engine().stage_of(args, place)
    from megatron.engine.deepspeed_module import LlamaPipelineModule

    return LlamaPipelineModule(args, place)
