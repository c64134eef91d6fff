"""Load a checkpoint: checked by all ranks together, then read, then agreed upon.

Nothing of the model changes before every file has been looked at. What does not fit stops all ranks with one message
that names the file and the tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.discovery import OPTIMIZER_FILE
from megatron.checkpoint.layer_files import load_layers, verify_before_load
from megatron.checkpoint.save import HF, read_small_files
from megatron.checkpoint.start import SavedCheckpoint, Start, locate
from megatron.checkpoint.state import TrainState, restore_rng
from megatron.checkpoint.torch_files import read_file
from megatron.common.errors import CheckpointError
from megatron.parallel.collective_errors import RankGroup

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine
    from megatron.neox_arguments import NeoXArgs

logger = logging.getLogger(__name__)

_WAYS_OUT = "start from its weights with `finetune: true`, or keep its position with `no_load_optim: true`"


def load_checkpoint(
    engine: Engine, args: NeoXArgs, start: Start, *, data_fingerprints: Mapping[str, Any] | None = None
) -> TrainState:
    """Fill the engine from `start.checkpoint` and return the run's position.

    Everything is restored only with the TP x PP x DP and the precision it was saved with. Weights alone, or weights and
    position, leave PP, DP and precision free; the optimizer's fp32 masters are then made from the weights.
    Collective over all ranks; CheckpointError is the same on all of them.
    """
    checkpoint = start.checkpoint
    assert checkpoint is not None
    ranks = RankGroup.world(engine.place.device)
    with ranks.together(f"loading {checkpoint.folder}"):
        if start.restores_optimizer:
            _refuse_unfit_optimizer(checkpoint, engine, args.precision)
    _verify(ranks, checkpoint, args)
    own: dict[str, Any] = {}
    with ranks.together(f"reading optimizer states of {checkpoint.folder}"):
        if start.restores_optimizer:
            own = read_file(checkpoint.folder / engine.optimizer_file_name(), classes=engine.optimizer_file().classes)
    _load_layers(ranks, checkpoint, engine)
    if start.restores_optimizer:
        engine.load_optimizer(own)
    else:
        # The fp32 copies were made when the engine was built; without this a step would undo the load.
        engine.weights_changed()
    position = start.position
    if start.restored != "weights":
        engine.counters = position.counters
    if "rng" in own and not args.no_load_rng:
        restore_rng(own["rng"])
    state = TrainState(
        position.iteration,
        position.consumed_samples,
        position.skipped_in_a_row,
        read_small_files(checkpoint.folder / HF) if ranks.rank == 0 else {},
    )
    logger.info(
        f"loaded {start.restored} from {checkpoint.folder}: iteration {state.iteration}, "
        f"{state.consumed_samples} samples"
    )
    if start.restored != "weights" and data_fingerprints is not None:
        _report_data(checkpoint.provenance.get("data", {}), data_fingerprints)
    return state


def load_weights(engine: Engine, args: NeoXArgs) -> Path:
    """Fill an engine that has no optimizer from `args.load`, for evaluation and generation; returns the folder.

    Collective over all ranks.
    """
    ranks = RankGroup.world(engine.place.device)
    if args.load is None:
        raise CheckpointError("`load` is not set; give the folder that holds `latest` and `global_stepN`")
    checkpoint = locate(ranks, Path(args.load), args.iteration)
    _verify(ranks, checkpoint, args)
    _load_layers(ranks, checkpoint, engine)
    engine.weights_changed()
    return checkpoint.folder


def _verify(ranks: RankGroup, checkpoint: SavedCheckpoint, args: NeoXArgs) -> None:
    with ranks.together(f"loading {checkpoint.folder}"):
        files = None if checkpoint.manifest is None else checkpoint.manifest.files
        part = (ranks.rank, ranks.size)
        problems = verify_before_load(checkpoint.folder, args.shape, args.model_parallel_size, part, files)
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise CheckpointError("; ".join(problems[:3]) + more)


def _load_layers(ranks: RankGroup, checkpoint: SavedCheckpoint, engine: Engine) -> None:
    conversions: set[tuple[str, str]] = set()
    with ranks.together(f"loading weights of {checkpoint.folder}"):
        conversions = load_layers(engine, checkpoint.folder)
    for stored, used in sorted(conversions):
        if stored != used:
            exact = used == "float32"
            logger.info(f"weights: {stored} in the files, {used} here ({'exact' if exact else 'rounded to nearest'})")


def _refuse_unfit_optimizer(checkpoint: SavedCheckpoint, engine: Engine, precision: str) -> None:
    """CheckpointError if the optimizer states are absent or for another split or precision; nothing is read."""
    folder, provenance = checkpoint.folder, checkpoint.provenance
    if checkpoint.manifest is None:
        raise CheckpointError(
            f"{folder} has no manifest: optimizer states of GPT-NeoX are not read; "
            f"start from its weights with `finetune: true`"
        )
    present = {name for name in checkpoint.manifest.files if OPTIMIZER_FILE.fullmatch(name)}
    if not present:
        reason = "they were removed (keep_optimizer_last_n)" if "optimizer" in provenance else "it is converted"
        raise CheckpointError(f"{folder} has no optimizer states: {reason}; {_WAYS_OUT}")
    saved, now = provenance.get("layout"), engine.place.sizes
    if saved != now:
        raise CheckpointError(
            f"{folder} was saved at {_layout(saved)}, this run is {_layout(now)}: optimizer states belong to one "
            f"split; run at the saved one, or {_WAYS_OUT}"
        )
    if provenance.get("precision") != precision:
        raise CheckpointError(
            f"{folder} was saved in precision {provenance.get('precision')}, this run is {precision}: optimizer states "
            f"differ between them; {_WAYS_OUT}"
        )
    missing = sorted(engine.optimizer_file_names() - present)
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}; {_WAYS_OUT}")


def _layout(sizes: Any) -> str:
    if not isinstance(sizes, Mapping):
        return "an unknown split"
    return ", ".join(f"{name.upper()} {sizes.get(name)}" for name in ("tp", "pp", "dp"))


def _report_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if changed:
        logger.warning(f"data differs from what this run was trained on so far: {', '.join(changed)}")
