"""Load a checkpoint: checked by all ranks together, then read, then agreed upon.

The model does not change before every file has been checked. A mismatch stops all ranks with one message that names the
file and the tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.adapter_files import load_adapter
from megatron.checkpoint.choice import own_options
from megatron.checkpoint.discovery import step_of
from megatron.checkpoint.facts import data_changes
from megatron.checkpoint.fingerprint import base_fingerprint
from megatron.checkpoint.layer_files import load_layers, verify_before_load
from megatron.checkpoint.manifest import checksum
from megatron.checkpoint.optimizer_load import SavedOptimizer
from megatron.checkpoint.resharded_layers import load_resharded_layers
from megatron.checkpoint.save import HF, read_small_files
from megatron.checkpoint.saved import SavedCheckpoint
from megatron.checkpoint.start import Start, locate
from megatron.checkpoint.state import Base, TrainState, restore_rng
from megatron.checkpoint.torch_files import read_headers
from megatron.checkpoint.verified import damage
from megatron.common.errors import CheckpointError, first_problems
from megatron.layout import EMBEDDING_INDEX, TensorSplit, layer_file_name, padded_vocab_size
from megatron.layout.peft_folder import FOLDER, adapter_folder
from megatron.model.initialize import initialize_adapters
from megatron.parallel.collective_errors import RankGroup, gather_by_rank

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine
    from megatron.neox_arguments import NeoXArgs

logger = logging.getLogger(__name__)


def load_checkpoint(
    engine: Engine, args: NeoXArgs, start: Start, *, data_fingerprints: Mapping[str, Any] | None = None
) -> TrainState:
    """Fill the engine from `start.checkpoint` and return the run's position.

    TP, PP and DP may differ from those of the save; random states are restored only if they are equal. Restoring
    everything needs the precision of the save. Weights alone, or weights and position, load into any precision; the
    optimizer's fp32 masters are then made from the weights.
    """
    checkpoint = start.checkpoint
    assert checkpoint is not None
    ranks = RankGroup.world(engine.place.device)
    weights = start.base or checkpoint
    here, there = TensorSplit(args.shape, args.model_parallel_size), saved_split(weights, args)
    # Check everything before the model changes.
    _verify(ranks, weights, there)
    optimizer: SavedOptimizer | None = None
    with ranks.together(f"loading {checkpoint.folder}"):
        if start.restores_optimizer:
            split = replace(saved_split(checkpoint, args), shape=args.trained_shape) if start.base else there
            optimizer = _fit_optimizer(checkpoint, args.precision, split, ways_out(args, start))
    if optimizer is not None:
        _find_states(ranks, optimizer, ways_out(args, start))
    # Weights, adapter, optimizer, random states.
    _load_layers(ranks, weights, engine, here, there)
    base = None
    if args.lora is not None:
        base = _base(weights, base_fingerprint(engine, args))
        _load_or_draw_adapter(ranks, engine, args, start, base)
    same_layout = checkpoint.layout == engine.place.sizes
    if optimizer is not None:
        random_states = None
        with ranks.together(f"loading optimizer states of {checkpoint.folder}"):
            optimizer.load(engine, TensorSplit(args.trained_shape, args.model_parallel_size))
            if same_layout and not args.no_load_rng:
                random_states = optimizer.random_states(engine)
        if random_states is not None:
            restore_rng(random_states)
    else:
        # The fp32 copies were made when the engine was built; without this a step would undo the load.
        engine.weights_changed()
    # Position, and the small files that every later checkpoint carries along.
    position = start.position
    if start.restored != "weights":
        engine.counters = position.counters if optimizer is None else optimizer.counters(position.counters)
    hf_files: dict[str, bytes] = {}
    with ranks.together(f"reading {checkpoint.folder / HF}"):
        if ranks.rank == 0:
            hf_files = read_small_files(checkpoint.folder / HF)
            _verify_small_files(checkpoint, hf_files)
    state = TrainState(
        position.iteration,
        position.consumed_samples,
        position.skipped_in_a_row,
        hf_files,
        step_of(checkpoint.folder) if start.own_save else None,
        base,
    )
    logger.info(
        f"loaded {start.restored} from {checkpoint.folder}: iteration {state.iteration}, "
        f"{state.consumed_samples} samples"
    )
    if start.restored != "weights" and not same_layout and checkpoint.layout.keys() == engine.place.sizes.keys():
        logger.info(f"saved at {_layout_text(checkpoint.layout)}, running at {_layout_text(engine.place.sizes)}")
    if start.restored != "weights" and data_fingerprints is not None:
        for line in data_changes(checkpoint.provenance.get("data", {}), data_fingerprints):
            logger.warning(line)
    return state


def load_weights(engine: Engine, args: NeoXArgs) -> Path:
    """Fill an engine that has no optimizer from `args.load`, for evaluation and generation; returns the folder.

    Collective over all ranks.
    """
    ranks = RankGroup.world(engine.place.device)
    if args.load is None:
        raise CheckpointError("`load` is not set; give the folder that holds `latest` and `global_stepN`")
    checkpoint = locate(ranks, Path(args.load), args.iteration, args)
    here, there = TensorSplit(args.shape, args.model_parallel_size), saved_split(checkpoint, args)
    _verify(ranks, checkpoint, there)
    _load_layers(ranks, checkpoint, engine, here, there)
    if args.lora is not None:
        _load_given_adapter(ranks, engine, args, base_fingerprint(engine, args))
    engine.weights_changed()
    return checkpoint.folder


def _base(checkpoint: SavedCheckpoint, fingerprint: str) -> Base:
    """The base that was loaded; a converted one is named after its source, which people know."""
    source = checkpoint.provenance.get("source")
    folder = checkpoint.folder.resolve()
    name = Path(source).name if isinstance(source, str) and source else folder.parent.name
    return Base(name, str(folder), fingerprint)


def _load_or_draw_adapter(ranks: RankGroup, engine: Engine, args: NeoXArgs, start: Start, base: Base) -> None:
    """Load the adapter of the run's checkpoint or of `lora.load`, or draw one that changes nothing yet. Collective."""
    checkpoint = start.checkpoint
    assert checkpoint is not None
    assert args.lora is not None
    if start.base is not None:
        with ranks.together(f"loading the adapter of {checkpoint.folder}"):
            recorded = checkpoint.provenance["base"]
            if recorded["fingerprint"] != base.fingerprint:
                raise CheckpointError(
                    f"{checkpoint.folder} was trained beside {recorded['name']} ({recorded['folder']}, fingerprint "
                    f"{recorded['fingerprint']}), but load: {args.load} holds other weights (fingerprint "
                    f"{base.fingerprint}); give the base that it was trained beside"
                )
            files = None if checkpoint.manifest is None else checkpoint.manifest.files
            load_adapter(engine, args, checkpoint.folder / FOLDER, files)
    elif args.lora.load is not None:
        _load_given_adapter(ranks, engine, args, base.fingerprint)
    else:
        initialize_adapters(engine.numbered_layers(), args, engine.place.tp, engine.place.tp_rank)


def _load_given_adapter(ranks: RankGroup, engine: Engine, args: NeoXArgs, fingerprint: str) -> None:
    """Load the adapter of `lora.load`. Collective."""
    assert args.lora is not None
    assert args.lora.load is not None
    named, folder = None, adapter_folder(Path(args.lora.load)) or Path(args.lora.load)
    with ranks.together(f"loading the adapter in {folder}"):
        named = load_adapter(engine, args, folder)
    if named is not None and named != fingerprint:
        logger.warning(
            f"{folder} was trained beside other weights (fingerprint {named}) than load: {args.load} holds "
            f"({fingerprint}); it is applied to them all the same"
        )
    logger.info(f"loaded the adapter in {folder}")


def saved_split(checkpoint: SavedCheckpoint, args: NeoXArgs) -> TensorSplit:
    """How a checkpoint's tensors are sharded: the TP that wrote it, and its padded vocabulary.

    Where the checkpoint does not say, the configuration's values are used.
    """
    tp = checkpoint.layout.get("tp", args.model_parallel_size)
    padded = padded_vocab_size(args.shape.vocab_size, args.make_vocab_size_divisible_by, tp)
    padded = checkpoint.provenance.get("shape", {}).get("padded_vocab_size", padded)
    return TensorSplit(replace(args.shape, padded_vocab_size=padded), tp)


def _verify(ranks: RankGroup, checkpoint: SavedCheckpoint, split: TensorSplit) -> None:
    with ranks.together(f"loading {checkpoint.folder}"):
        files = None if checkpoint.manifest is None else checkpoint.manifest.files
        part = (ranks.rank, ranks.size)
        problems = verify_before_load(checkpoint.folder, split.shape, split.tp, part, files)
        if problems:
            raise CheckpointError(first_problems(problems))


def _verify_small_files(checkpoint: SavedCheckpoint, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        entry = checkpoint.entry(f"{HF}/{name}")
        if entry is not None and entry.checksum is not None and checksum(content) != entry.checksum:
            raise CheckpointError(damage(checkpoint.folder / HF / name, checksum(content), entry.checksum))


def _load_layers(
    ranks: RankGroup, checkpoint: SavedCheckpoint, engine: Engine, here: TensorSplit, there: TensorSplit
) -> None:
    conversions: set[tuple[str, str]] = set()
    with ranks.together(f"loading weights of {checkpoint.folder}"):
        files = None if checkpoint.manifest is None else checkpoint.manifest.files
        if here == there:
            conversions = load_layers(engine, checkpoint.folder, files)
        else:
            conversions = load_resharded_layers(engine, checkpoint.folder, here, there, files or {})
    for stored, used in sorted(conversions):
        if stored != used:
            exact = used == "float32"
            logger.info(f"weights: {stored} in the files, {used} here ({'exact' if exact else 'rounded to nearest'})")


def ways_out(args: NeoXArgs, start: Start) -> str:
    """What a user can do without the optimizer states; for a run's own checkpoints this needs an explicit `load`."""
    if not start.own_save:
        return "start from its weights with --finetune true, or keep its position with --no_load_optim true"
    own = own_options(args)
    if args.lora is not None:
        return (
            f"keep its position with {own} --no_load_optim true, or start from its adapter in another folder with "
            f"--lora.load {args.save} --save NEW"
        )
    return (
        f"keep its position with {own} --no_load_optim true, or start from its weights in another folder with {own} "
        f"--finetune true --save NEW"
    ).replace(" --finetune false --finetune true", " --finetune true")


def _fit_optimizer(checkpoint: SavedCheckpoint, precision: str, split: TensorSplit, instead: str) -> SavedOptimizer:
    """The checkpoint's optimizer states; CheckpointError if they are absent or do not fit this run.

    `instead` is what a user can do without them.
    """
    folder = checkpoint.folder
    optimizer = SavedOptimizer(checkpoint, split)
    if not optimizer.files:
        if checkpoint.manifest is None:
            reason = "of GPT-NeoX's files those of ZeRO stage 1 are read (zero_pp_rank_X_mp_rank_YY_optim_states.pt)"
        elif "optimizer" in checkpoint.provenance:
            reason = "they were removed (keep_optimizer_last_n)"
        else:
            reason = "it is converted"
        raise CheckpointError(f"{folder} has no optimizer states: {reason}; {instead}")
    saved = checkpoint.provenance.get("precision")
    if checkpoint.manifest is None:
        weights = read_headers(folder / layer_file_name(EMBEDDING_INDEX, 0)).values()
        saved = {"float32": "fp32", "float16": "fp16"}.get(next(iter(weights)).dtype, "bfloat16")
    if saved != precision:
        raise CheckpointError(
            f"{folder} was saved in precision {saved}, this run is {precision}: optimizer states "
            f"differ between them; {instead}"
        )
    return optimizer


def _find_states(ranks: RankGroup, optimizer: SavedOptimizer, instead: str) -> None:
    """Index where the states lie, and check that the files hold each element of the model's state once. Collective."""
    with ranks.together(f"loading {optimizer.folder}"):
        part = optimizer.read_part(ranks.rank, ranks.size)
    parts = gather_by_rank(part, ranks.group)
    with ranks.together(f"loading {optimizer.folder}"):
        optimizer.join(parts)
        # One rank checks: all have the same index.
        if ranks.rank == 0 and (problems := optimizer.index.problems()):
            raise CheckpointError(f"{optimizer.folder} is not complete: {first_problems(problems)}; {instead}")


def _layout_text(sizes: Mapping[str, Any]) -> str:
    """TP, PP and DP for the log, such as "TP2 PP1 DP4"."""
    return " ".join(f"{name.upper()}{sizes[name]}" for name in ("tp", "pp", "dp"))
