"""Save a checkpoint that is complete or does not exist.

All ranks write into `global_stepN.tmp`, each file synced; they agree that every file was written; rank 0 adds the
small files and, last, the manifest, renames the folder and moves `latest`. Whatever is killed when, `latest` names a
complete checkpoint. A rank that cannot write makes all ranks raise the same CheckpointError, and the partial folder
is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron.checkpoint.agreement import Ranks
from megatron.checkpoint.deepspeed_files import OPTIMIZER_CLASSES, Place, meta_content, optimizer_content
from megatron.checkpoint.errors import CheckpointError, describe
from megatron.checkpoint.folders import PARTIAL, clean_leftovers, publish, tag_name
from megatron.checkpoint.layers import expected_files, tensor_problems, write_layers
from megatron.checkpoint.manifest import FileEntry, Manifest, checksum, size_problems, write_manifest
from megatron.checkpoint.provenance import provenance
from megatron.checkpoint.retention import apply_retention
from megatron.checkpoint.state import TrainState, capture_rng
from megatron.checkpoint.torch_files import write_file

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from megatron.neox_arguments import NeoXArgs

CONFIGS, HF = "configs", "hf"


def prepare_save(engine: PipelineEngine, args: NeoXArgs, log: Callable[[str], None] = print) -> None:
    """Before the first step of training: the save folder exists, can be written, and holds no left-overs.

    Collective. Only for the run that owns the folder: another run's save in progress would be removed.
    """
    assert args.save is not None
    ranks = Ranks.of(engine)
    root = Path(args.save)
    with ranks.together("preparing the save folder"):
        if ranks.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            clean_leftovers(root, log)
    with ranks.together("preparing the save folder"):
        if not os.access(root, os.W_OK | os.X_OK):
            raise CheckpointError(f"save: {root} cannot be written from this rank")


def save_checkpoint(
    engine: PipelineEngine,
    args: NeoXArgs,
    state: TrainState,
    *,
    data_fingerprints: Mapping[str, Any],
    log: Callable[[str], None] = print,
) -> Path:
    """Save weights, optimizer, position and random states at `state.iteration` under `args.save`; returns the folder.

    Collective over all ranks. CheckpointError, the same on all ranks, if any rank could not write; the checkpoints
    that were there before are untouched then. Older ones are thinned out (`keep_last_n_checkpoints`,
    `keep_optimizer_last_n`) after the new one is complete. `log` is called on rank 0.
    """
    assert args.save is not None
    ranks, place = Ranks.of(engine), Place.of(engine)
    root = Path(args.save)
    final = root / tag_name(state.iteration)
    partial = root / (final.name + PARTIAL)
    what = f"saving {final}"
    try:
        with ranks.together(what):
            if ranks.rank == 0:
                root.mkdir(parents=True, exist_ok=True)
                clean_leftovers(root, log)
                partial.mkdir()
        entries: dict[str, FileEntry] = {}
        with ranks.together(what):
            entries = _write_rank_files(engine, args, state, place, partial)
        gathered = ranks.gather(entries)
        with ranks.together(what):
            if ranks.rank == 0:
                _finish(args, state, place, partial, final, gathered, data_fingerprints)
    except CheckpointError:
        with ranks.together(f"removing {partial}"):  # before any rank ends and takes the others down
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        raise
    if ranks.rank == 0:
        log(f"saved {final}")
        try:
            keep = (args.keep_last_n_checkpoints, args.keep_optimizer_last_n)
            apply_retention(root, state.iteration, *keep, log)
        except (OSError, CheckpointError) as error:
            log(f"warning: an old checkpoint could not be removed: {describe(error)}")
    return final


def _write_rank_files(
    engine: PipelineEngine, args: NeoXArgs, state: TrainState, place: Place, folder: Path
) -> dict[str, FileEntry]:
    entries = write_layers(engine.module, folder)
    if place.dp_rank == 0:
        meta = meta_content(engine) | _client_state(args, state)
        if meta["lr_scheduler"] is None:
            meta["lr_scheduler"] = state.lr_scheduler_state
        entries[place.meta_file] = write_file(folder / place.meta_file, meta)
    optimizer = optimizer_content(engine)
    if not args.no_save_rng:
        optimizer["rng"] = capture_rng()
    entries[place.optimizer_file] = write_file(folder / place.optimizer_file, optimizer, OPTIMIZER_CLASSES)
    return entries


def _client_state(args: NeoXArgs, state: TrainState) -> dict[str, Any]:
    """What GPT-NeoX expects beside DeepSpeed's keys, and our position."""
    names = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "tokenizer_type",
        "model_parallel_size",
    )
    return {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "skipped_in_a_row": state.skipped_in_a_row,
        "args": {name: getattr(args, name) for name in names},
    }


def _finish(
    args: NeoXArgs,
    state: TrainState,
    place: Place,
    partial: Path,
    final: Path,
    gathered: list[dict[str, FileEntry]],
    data_fingerprints: Mapping[str, Any],
) -> None:
    """Rank 0: the small files, the checks, the manifest, the names."""
    files = {name: entry for entries in gathered for name, entry in entries.items()}
    files |= write_small_files(partial / HF, state.hf_files)
    merged = yaml.safe_dump(dict(args.merged), sort_keys=False).encode()
    files |= write_small_files(partial / CONFIGS, {"merged.yml": merged})
    problems = [
        f"{name}: {problem}"
        for name, rows in expected_files(args.shape, place.tp).items()
        for problem in (
            tensor_problems(files[name].tensors, rows, args.shape, place.tp) if name in files else ["was not written"]
        )
    ]
    manifest = Manifest(
        files,
        provenance(
            iteration=state.iteration,
            consumed_samples=state.consumed_samples,
            merged=args.merged,
            shape=args.shape,
            precision=args.precision,
            layout=place.sizes,
            data=data_fingerprints,
        ),
    )
    problems += size_problems(partial, manifest)
    if problems:
        raise CheckpointError("; ".join(problems[:5]))
    write_manifest(partial, manifest)
    publish(partial, final)


def write_small_files(folder: Path, contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Write `contents` (path in the folder -> bytes), synced; manifest entries named `<folder name>/<path>`."""
    entries = {}
    for name, content in sorted(contents.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        entries[f"{folder.name}/{name}"] = FileEntry(len(content), {}, checksum(content))
    return entries


def read_small_files(folder: Path) -> dict[str, bytes]:
    """The files below `folder` by their path in it; empty if there is no such folder."""
    with contextlib.suppress(FileNotFoundError):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {}
