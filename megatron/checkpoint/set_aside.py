"""Going back to an earlier step: later checkpoints are renamed, so that nothing overwrites or deletes them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from megatron.checkpoint.discovery import LATEST, steps_in, tag_name
from megatron.common.atomic_files import sync_folder, write_text

logger = logging.getLogger(__name__)

SET_ASIDE = ".set_aside"


def set_aside_later(root: Path, iteration: int) -> list[Path]:
    """Rename every `global_stepN` of a step after `iteration` to `global_stepN.set_aside`; returns the new names.

    `latest` moves first, to the step that the run has resumed: after a kill on the way, the next start resumes the same
    step. A second folder of a step becomes `global_stepN.set_aside.2`, and so on.
    """
    later = [step for step in steps_in(root) if step > iteration]
    if not later:
        return []
    write_text(root / LATEST, tag_name(iteration) + "\n")
    moved = []
    for step in reversed(later):
        target = _free_name(root / (tag_name(step) + SET_ASIDE))
        os.rename(root / tag_name(step), target)
        moved.append(target)
    sync_folder(root)
    names = ", ".join(path.name for path in reversed(moved))
    logger.info(
        f"{root}: the run goes on from iteration {iteration}; later checkpoints are set aside as {names}. To return to "
        f"one, rename it back; nothing removes them"
    )
    return moved


def _free_name(wanted: Path) -> Path:
    name, number = wanted, 2
    while name.exists():
        name, number = wanted.with_name(f"{wanted.name}.{number}"), number + 1
    return name
