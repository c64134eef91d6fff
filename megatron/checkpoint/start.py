"""Where a run starts: from scratch, from a checkpoint, or from its own last save. Found before anything is built.

`choice` decides which; here rank 0 opens it and compares its facts with the configuration, and all ranks follow.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.checkpoint.choice import Restored, StartChoice, choose_start, own_options
from megatron.checkpoint.discovery import meta_file_name
from megatron.checkpoint.facts import describe_run_changes
from megatron.checkpoint.saved import SavedCheckpoint, saved_base, saved_checkpoint
from megatron.checkpoint.torch_files import read_file
from megatron.checkpoint.verified import verified
from megatron.common.errors import CheckpointError
from megatron.engine.protocol import Counters, LossScaleState

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs
    from megatron.parallel.collective_errors import RankGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """The position of a saved run."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_in_a_row: int = 0
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True)
class Start:
    """What a run starts from. Without a checkpoint the weights are initialized at random.

    `own_save`: the checkpoint lies in the folder that the run saves to. When a run with `lora` resumes, `checkpoint`
    holds the adapter and `base` the weights.
    """

    checkpoint: SavedCheckpoint | None = None
    restored: Restored = "everything"
    position: Position = field(default_factory=Position)
    own_save: bool = False
    base: SavedCheckpoint | None = None

    @property
    def restores_optimizer(self) -> bool:
        return self.checkpoint is not None and self.restored == "everything"


def find_start(ranks: RankGroup, args: NeoXArgs) -> Start:
    """The checkpoint that a run starts from, and its position. Collective: rank 0 looks, all follow.

    CheckpointError, the same on all ranks, if the checkpoint is missing, incomplete, of another model, or lacks its
    position.
    """
    choice: StartChoice | None = None
    with ranks.together("finding where to start"):
        if ranks.rank == 0:
            choice = choose_start(args)
    choice = ranks.broadcast(choice)
    if choice is None:
        return Start()
    for note in choice.notes:
        logger.info(note)
    options = own_options(args) if choice.own_save else None
    checkpoint = locate(ranks, choice.root, choice.iteration, args, options, own=choice.own_save)
    base = _locate_base(ranks, checkpoint, args) if args.lora is not None and choice.own_save else None
    if choice.restored == "weights":
        return Start(checkpoint, choice.restored, Position(), choice.own_save)
    if checkpoint.manifest is None:
        position = position_of_gpt_neox(checkpoint.folder, args.train_batch_size)
        return Start(checkpoint, choice.restored, position, choice.own_save)
    with ranks.together(f"comparing {checkpoint.folder} with the configuration"):
        changes = None
        if ranks.rank == 0:
            changes = describe_run_changes(checkpoint.facts()[1], args)
        if changes is not None:
            logger.warning(changes)
    return Start(checkpoint, choice.restored, read_position(ranks, checkpoint), choice.own_save, base)


def locate(
    ranks: RankGroup,
    root: Path,
    iteration: int | None,
    args: NeoXArgs,
    options: str | None = None,
    *,
    own: bool = False,
) -> SavedCheckpoint:
    """Find the checkpoint that all ranks read; rank 0 looks, so that all use the same one.

    CheckpointError on all ranks if there is none, or its model is not the one that `args` describe.
    """
    found = None
    with ranks.together(f"loading from {root}"):
        if ranks.rank == 0:
            found = saved_checkpoint(root, iteration, args, options, own=own)
    checkpoint = ranks.broadcast(found)
    assert checkpoint is not None
    return checkpoint


def _locate_base(ranks: RankGroup, checkpoint: SavedCheckpoint, args: NeoXArgs) -> SavedCheckpoint:
    found = None
    with ranks.together(f"loading the base of {checkpoint.folder} from {args.load}"):
        if ranks.rank == 0:
            found = saved_base(checkpoint, args)
    base = ranks.broadcast(found)
    assert base is not None
    return base


def position_of_gpt_neox(folder: Path, train_batch_size: int) -> Position:
    """Position of a GPT-NeoX run: the iteration in its folder's name, and its samples at this run's batch size.

    Its own files hold numpy arrays, which only running code restores, and do not count samples. CheckpointError for a
    folder with another name.
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
            with verified(path, checkpoint.entry(path.name)):
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
                    meta.get("overflow_steps", 0),  # fp16 only, like the loss scale
                    LossScaleState(**meta["loss_scale"]) if "loss_scale" in meta else None,
                ),
            )
    found = ranks.broadcast(position)
    assert found is not None
    return found
