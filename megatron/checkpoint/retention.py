"""Old checkpoints make room: whole ones beyond `keep_last_n_checkpoints`, optimizer states beyond their own number.

Only checkpoints that this program's training wrote are touched, never a converted one or GPT-NeoX's, and never one of
a later step than the present: after going back to an earlier checkpoint those are the user's to delete.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from megatron.checkpoint.discovery import OPTIMIZER_FILE, remove, steps_in, tag_name
from megatron.checkpoint.manifest import ManifestError, read_manifest, write_manifest
from megatron.checkpoint.provenance import TRAINING
from megatron.common.atomic_files import sync_folder

logger = logging.getLogger(__name__)


def apply_retention(root: Path, iteration: int, keep_last_n: int | None, keep_optimizer_last_n: int | None) -> None:
    """Delete what is older than wanted; call it when the checkpoint of `iteration` is complete. None keeps all."""
    ours = [step for step in steps_in(root) if step <= iteration and _written_by_training(root / tag_name(step))]
    newest_first = ours[::-1]
    kept = newest_first if keep_last_n is None else newest_first[: max(keep_last_n, 1)]
    for step in newest_first[len(kept) :]:
        remove(root / tag_name(step))
        logger.info(f"removed {root / tag_name(step)} (keep_last_n_checkpoints: {keep_last_n})")
    if keep_optimizer_last_n is not None:
        for step in kept[keep_optimizer_last_n:]:
            if remove_optimizer(root / tag_name(step)):
                logger.info(f"removed optimizer states of {root / tag_name(step)} (keep_optimizer_last_n)")


def remove_optimizer(folder: Path) -> bool:
    """Delete a checkpoint's optimizer files, after its manifest says that it has none; False if it had none.

    Killed in between, files lie there that the manifest does not list; the next call deletes them.
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
