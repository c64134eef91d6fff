"""Removes checkpoints beyond `keep_last_n_checkpoints`, and optimizer states beyond `keep_optimizer_last_n`.

Only checkpoints that this program's training wrote are touched, never a converted one or GPT-NeoX's, never one of a
step later than the current one, and never the one that the run was started from.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from megatron.checkpoint.discovery import OPTIMIZER_FILE, completeness_problems, remove, steps_in, tag_name
from megatron.checkpoint.manifest import ManifestError, read_manifest, write_manifest
from megatron.checkpoint.provenance import TRAINING
from megatron.common.atomic_files import sync_folder

logger = logging.getLogger(__name__)


def apply_retention(
    root: Path,
    iteration: int,
    keep_last_n: int | None,
    keep_optimizer_last_n: int | None,
    started_from: int | None = None,
) -> None:
    """Delete old checkpoints and optimizer states, once the checkpoint of `iteration` is complete. None keeps all.

    Only complete checkpoints count, and only they are deleted: a damaged one must not push out a good one. The one of
    step `started_from`, from which the run resumed, stays whole as long as the run continues.
    """
    if keep_last_n is None and keep_optimizer_last_n is None:
        return
    ours = [step for step in steps_in(root) if step <= iteration and _written_by_training(root / tag_name(step))]
    damaged = [step for step in ours if completeness_problems(root / tag_name(step))]
    for step in damaged:
        logger.warning(f"{root / tag_name(step)} is not complete and is not counted; it is left as it is")
    newest_first = [step for step in ours if step not in damaged][::-1]
    kept = newest_first if keep_last_n is None else newest_first[: max(keep_last_n, 1)]
    for step in newest_first[len(kept) :]:
        if step == started_from:
            continue
        remove(root / tag_name(step))
        logger.info(f"removed {root / tag_name(step)} (keep_last_n_checkpoints: {keep_last_n})")
    if keep_optimizer_last_n is not None:
        for step in kept[keep_optimizer_last_n:]:
            if step != started_from and remove_optimizer(root / tag_name(step)):
                logger.info(f"removed optimizer states of {root / tag_name(step)} (keep_optimizer_last_n)")


def remove_optimizer(folder: Path) -> bool:
    """Remove a checkpoint's optimizer files from its manifest, then delete them; False if it had none.

    If killed in between, files remain that the manifest does not list; the next call deletes them.
    """
    files = [path for path in folder.iterdir() if OPTIMIZER_FILE.fullmatch(path.name)]
    if not files:
        return False
    manifest = read_manifest(folder)
    remaining = {name: entry for name, entry in manifest.files.items() if not OPTIMIZER_FILE.fullmatch(name)}
    write_manifest(folder, replace(manifest, files=remaining, provenance=manifest.provenance | {"optimizer": False}))
    for path in files:
        os.unlink(path)
    sync_folder(folder)
    return True


def _written_by_training(folder: Path) -> bool:
    try:
        return read_manifest(folder).provenance.get("written_by") == TRAINING
    except ManifestError:
        return False
