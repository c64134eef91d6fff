"""Where a run begins: from scratch, from a checkpoint, or from its own last save. Found before anything is built.

A batch system requeues the same script, and `load: converted weights, finetune: true` would begin at iteration 0 every
time. So a run whose `save` folder holds its checkpoints continues from the last of them, and says so.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron.checkpoint.discovery import LATEST, find_checkpoint, meta_file_name
from megatron.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron.checkpoint.torch_files import read_file
from megatron.common.errors import CheckpointError
from megatron.engine.protocol import Counters, LossScaleState

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs
    from megatron.parallel.collective_errors import RankGroup

logger = logging.getLogger(__name__)

Restored = Literal["everything", "weights and position", "weights"]


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint folder and its manifest, None if GPT-NeoX wrote it."""

    folder: Path
    manifest: Manifest | None

    @property
    def provenance(self) -> dict[str, Any]:
        return {} if self.manifest is None else self.manifest.provenance


@dataclass(frozen=True)
class Position:
    """Where a saved run stood."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_in_a_row: int = 0
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True)
class Start:
    """What a run begins with. Without a checkpoint the weights are drawn.

    `own_save`: the checkpoint lies in the folder that the run saves to.
    """

    checkpoint: SavedCheckpoint | None = None
    restored: Restored = "everything"
    position: Position = field(default_factory=Position)
    own_save: bool = False

    @property
    def restores_optimizer(self) -> bool:
        return self.checkpoint is not None and self.restored == "everything"


def find_start(ranks: RankGroup, args: NeoXArgs) -> Start:
    """The checkpoint that a run begins from, and its position. Collective: rank 0 looks, all follow.

    A `load` that names the save folder itself is taken as it stands, with its `finetune` and `no_load_optim`.
    CheckpointError, the same on all ranks, if the checkpoint is missing, incomplete or does not say its position.
    """
    own = _is_same_folder(args.load, args.save)
    if args.save and not own and ranks.broadcast(ranks.rank == 0 and (Path(args.save) / LATEST).is_file()):
        first = "from_scratch" if args.from_scratch else f"load: {args.load}"
        logger.info(
            f"{args.save} holds checkpoints of this run: it continues from the last one ({first} was for its first "
            "start)"
        )
        return _start(ranks, args, Path(args.save), None, "everything", own_save=True)
    if args.load is None:
        return Start()
    restored: Restored = "weights" if args.finetune else "weights and position" if args.no_load_optim else "everything"
    return _start(ranks, args, Path(args.load), args.iteration, restored, own)


def _is_same_folder(load: str | None, save: str | None) -> bool:
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()


def _start(
    ranks: RankGroup, args: NeoXArgs, root: Path, iteration: int | None, restored: Restored, own_save: bool
) -> Start:
    checkpoint = locate(ranks, root, iteration)
    if restored == "weights":
        position = Position()
    elif checkpoint.manifest is None:
        position = position_of_gpt_neox(checkpoint.folder, args.train_batch_size)
    else:
        position = read_position(ranks, checkpoint)
    return Start(checkpoint, restored, position, own_save)


def locate(ranks: RankGroup, root: Path, iteration: int | None) -> SavedCheckpoint:
    """The checkpoint that all ranks read; rank 0 looks, so that all see the same one."""
    found = None
    with ranks.together(f"loading from {root}"):
        if ranks.rank == 0:
            folder = find_checkpoint(root, iteration)
            found = SavedCheckpoint(folder, read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None)
    checkpoint = ranks.broadcast(found)
    assert checkpoint is not None
    return checkpoint


def position_of_gpt_neox(folder: Path, train_batch_size: int) -> Position:
    """Where a run of GPT-NeoX stood: the iteration that its folder's name says, with batches of this run's size.

    Its own files hold arrays of numpy, which only running code brings back; and they do not count samples.
    CheckpointError for a folder with another name.
    """
    match = re.fullmatch(r"global_step(\d+)", folder.name)
    if match is None:
        raise CheckpointError(
            f"{folder} was written by GPT-NeoX or for it, and its name says no iteration; start from its weights with "
            f"`finetune: true`"
        )
    iteration = int(match[1])
    samples = iteration * train_batch_size
    logger.info(
        f"{folder} was written by GPT-NeoX: its run goes on at iteration {iteration}, which was {samples} samples in "
        f"batches of {train_batch_size}"
    )
    return Position(iteration, samples, 0, Counters(iteration, samples))


def read_position(ranks: RankGroup, checkpoint: SavedCheckpoint) -> Position:
    """The saved position, read by rank 0 from the meta file of the first stage."""
    position: Position | None = None
    path = checkpoint.folder / meta_file_name(0)
    with ranks.together(f"reading the position in {checkpoint.folder}"):
        if ranks.rank == 0:
            meta = read_file(path)
            wanted = ("iteration", "consumed_samples", "global_steps", "global_samples", "skipped_steps")
            missing = [key for key in wanted if key not in meta]
            if missing:
                raise CheckpointError(
                    f"{path} has no {', '.join(missing)}: the run's position is unknown; "
                    f"start from the weights with `finetune: true`"
                )
            position = Position(
                meta["iteration"],
                meta["consumed_samples"],
                meta.get("skipped_in_a_row", 0),  # GPT-NeoX does not count it
                Counters(
                    meta["global_steps"],
                    meta["global_samples"],
                    meta["skipped_steps"],
                    meta.get("overflow_steps", 0),  # of fp16 alone, as its scale
                    LossScaleState(**meta["loss_scale"]) if "loss_scale" in meta else None,
                ),
            )
    found = ranks.broadcast(position)
    assert found is not None
    return found
