"""Load a checkpoint: found and checked by all ranks together, then read, then agreed upon.

Nothing of the model changes before every file has been looked at. What does not fit stops all ranks with one message
that names the file and the tensor.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron.checkpoint.discovery import OPTIMIZER_FILE, find_checkpoint
from megatron.checkpoint.layer_files import load_layers, verify_before_load
from megatron.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron.checkpoint.save import HF, read_small_files
from megatron.checkpoint.state import TrainState, restore_rng
from megatron.checkpoint.torch_files import read_file
from megatron.common.errors import CheckpointError
from megatron.engine.deepspeed_files import OPTIMIZER_CLASSES, Place
from megatron.parallel.collective_errors import RankGroup

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from megatron.model.pipeline import LlamaPipelineModule
    from megatron.neox_arguments import NeoXArgs

_META = "mp_rank_00_model_states.pt"
_WAYS_OUT = "start from its weights with `finetune: true`, or keep its position with `no_load_optim: true`"


@dataclass(frozen=True)
class Source:
    """A checkpoint folder and its manifest, None if GPT-NeoX wrote it."""

    folder: Path
    manifest: Manifest | None

    @property
    def provenance(self) -> dict[str, Any]:
        return {} if self.manifest is None else self.manifest.provenance


def load_checkpoint(
    engine: PipelineEngine,
    args: NeoXArgs,
    *,
    data_fingerprints: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> TrainState | None:
    """Fill the engine from `args.load` and return the run's position; None if `args.load` is not set.

    By default everything is restored, which needs the TP x PP x DP and the precision it was saved with. With
    `finetune` only weights are loaded and the run starts at iteration 0; with `no_load_optim` weights, position and
    schedule. Then PP, DP and precision are free, and the optimizer's fp32 masters are made from the weights.
    Collective over all ranks; CheckpointError is the same on all of them. `log` is called on rank 0.
    """
    if args.load is None:
        return None
    ranks, place = RankGroup.world(engine.device), Place.of(engine)
    source = locate(ranks, Path(args.load), args.iteration, log)
    weights_only = args.finetune or args.no_load_optim
    with ranks.together(f"loading {source.folder}"):
        if not weights_only:
            _refuse_unfit_optimizer(source, place, args.precision)
    _verify(ranks, source, args)
    position = _read_position(ranks, source, args)
    own: dict[str, Any] = {}
    with ranks.together(f"reading optimizer states of {source.folder}"):
        if not weights_only:
            own = read_file(source.folder / place.optimizer_file, classes=OPTIMIZER_CLASSES)
    _load_layers(ranks, source, engine.module, log)
    with ranks.together(f"taking over the state of {source.folder}"):
        if weights_only:
            _refresh_masters(engine)
    if not weights_only:
        _restore_optimizer(engine, place, own)
    state = TrainState(hf_files=read_small_files(source.folder / HF) if ranks.rank == 0 else {})
    if position is not None:
        _restore_position(engine, state, position)
    if "rng" in own and not args.no_load_rng:
        restore_rng(own["rng"])
    if ranks.rank == 0:
        kind = "weights" if args.finetune else "weights and position" if args.no_load_optim else "everything"
        log(f"loaded {kind} from {source.folder}: iteration {state.iteration}, {state.consumed_samples} samples")
        if position is not None and data_fingerprints is not None:
            _report_data(source.provenance.get("data", {}), data_fingerprints, log)
    return state


def load_weights(
    module: LlamaPipelineModule,
    args: NeoXArgs,
    group: dist.ProcessGroup,
    log: Callable[[str], None] = print,
) -> Path:
    """Fill a pipeline stage from `args.load` without an engine, for evaluation and generation; returns the folder.

    Collective over `group`, the ranks that hold one model. With an optimizer use `load_checkpoint`, which also renews
    the fp32 masters.
    """
    ranks = RankGroup(group, next(module.parameters()).device)
    if args.load is None:
        raise CheckpointError("`load` is not set; give the folder that holds `latest` and `global_stepN`")
    source = locate(ranks, Path(args.load), args.iteration, log)
    _verify(ranks, source, args)
    _load_layers(ranks, source, module, log)
    return source.folder


def locate(ranks: RankGroup, root: Path, iteration: int | None, log: Callable[[str], None]) -> Source:
    """The checkpoint that all ranks read; rank 0 looks, so that all see the same one."""
    found = None
    with ranks.together(f"loading from {root}"):
        if ranks.rank == 0:
            folder = find_checkpoint(root, iteration, log)
            found = Source(folder, read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None)
    source = ranks.broadcast(found)
    assert source is not None
    return source


def _verify(ranks: RankGroup, source: Source, args: NeoXArgs) -> None:
    with ranks.together(f"loading {source.folder}"):
        files = None if source.manifest is None else source.manifest.files
        part = (ranks.rank, ranks.size)
        problems = verify_before_load(source.folder, args.shape, args.model_parallel_size, part, files)
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise CheckpointError("; ".join(problems[:3]) + more)


def _load_layers(ranks: RankGroup, source: Source, module: LlamaPipelineModule, log: Callable[[str], None]) -> None:
    conversions: set[tuple[str, str]] = set()
    with ranks.together(f"loading weights of {source.folder}"):
        conversions = load_layers(module, source.folder)
    for stored, used in sorted(conversions):
        if stored != used and ranks.rank == 0:
            exact = used == "float32"
            log(f"weights: {stored} in the files, {used} here ({'exact' if exact else 'rounded to nearest'})")


def _refuse_unfit_optimizer(source: Source, place: Place, precision: str) -> None:
    """CheckpointError if the optimizer states are absent or for another split or precision; nothing is read."""
    if source.manifest is None:
        raise CheckpointError(
            f"{source.folder} has no manifest: optimizer states of GPT-NeoX are not read; "
            f"start from its weights with `finetune: true`"
        )
    present = {name for name in source.manifest.files if OPTIMIZER_FILE.fullmatch(name)}
    if not present:
        reason = "they were removed (keep_optimizer_last_n)" if "optimizer" in source.provenance else "it is converted"
        raise CheckpointError(f"{source.folder} has no optimizer states: {reason}; {_WAYS_OUT}")
    saved, now = source.provenance.get("layout"), place.sizes
    if saved != now:
        raise CheckpointError(
            f"{source.folder} was saved at {_layout(saved)}, this run is {_layout(now)}: optimizer states belong to "
            f"one split; run at the saved one, or {_WAYS_OUT}"
        )
    if source.provenance.get("precision") != precision:
        raise CheckpointError(
            f"{source.folder} was saved in precision {source.provenance.get('precision')}, this run is {precision}: "
            f"optimizer states differ between them; {_WAYS_OUT}"
        )
    missing = sorted(place.all_optimizer_files() - present)
    if missing:
        raise CheckpointError(f"{source.folder} lacks {', '.join(missing[:3])}; {_WAYS_OUT}")


def _layout(sizes: Any) -> str:
    if not isinstance(sizes, Mapping):
        return "an unknown split"
    return ", ".join(f"{name.upper()} {sizes.get(name)}" for name in ("tp", "pp", "dp"))


def _read_position(ranks: RankGroup, source: Source, args: NeoXArgs) -> dict[str, Any] | None:
    """The saved position and schedule, from rank 0; None when the run starts anew."""
    if args.finetune:
        return None
    position: dict[str, Any] = {}
    with ranks.together(f"reading the position in {source.folder}"):
        if ranks.rank == 0:
            meta = read_file(source.folder / _META)
            wanted = (
                "iteration",
                "consumed_samples",
                "lr_scheduler",
                "global_steps",
                "global_samples",
                "skipped_steps",
            )
            missing = [key for key in wanted if key not in meta]
            if missing:
                raise CheckpointError(
                    f"{source.folder / _META} has no {', '.join(missing)}: the run's position is unknown; "
                    f"start from the weights with `finetune: true`"
                )
            position = {key: meta[key] for key in wanted}
            position["skipped_in_a_row"] = meta.get("skipped_in_a_row", 0)  # GPT-NeoX does not count it
    return ranks.broadcast(position)


def _refresh_masters(engine: PipelineEngine) -> None:
    """The optimizer's fp32 copies were made when the engine was built; without this a step would undo the load."""
    if engine.optimizer is not None:
        engine.optimizer.refresh_fp32_params()


def _restore_optimizer(engine: PipelineEngine, place: Place, own: dict[str, Any]) -> None:
    states: list[Any] = [None] * place.dp
    states[place.dp_rank] = own["optimizer_state_dict"]
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints a line of its own on every rank
        engine.optimizer.load_state_dict(
            state_dict_list=states, load_optimizer_states=True, load_from_fp32_weights=True
        )


def _restore_position(engine: PipelineEngine, state: TrainState, position: dict[str, Any]) -> None:
    state.iteration, state.consumed_samples = position["iteration"], position["consumed_samples"]
    state.skipped_in_a_row = position["skipped_in_a_row"]
    state.lr_scheduler_state = position["lr_scheduler"]
    if engine.lr_scheduler is not None and state.lr_scheduler_state is not None:
        engine.lr_scheduler.load_state_dict(state.lr_scheduler_state)
    engine.global_steps, engine.global_samples = position["global_steps"], position["global_samples"]
    engine.skipped_steps = position["skipped_steps"]


def _report_data(saved: Mapping[str, Any], now: Mapping[str, Any], log: Callable[[str], None]) -> None:
    changed = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if changed:
        log(f"warning: data differs from what this run was trained on so far: {', '.join(changed)}")
