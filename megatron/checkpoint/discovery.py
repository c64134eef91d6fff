"""Which folder is the checkpoint: names, `latest`, completeness, leftovers of killed runs. Standard library only.

A run folder holds `global_stepN/` for each checkpoint and `latest`, the name of one of them. Names with a suffix are
never checkpoints in use:

- `global_stepN.tmp`: being written, or being deleted. Disposable; the next save removes it.
- `global_stepN.replaced`: the previous checkpoint of the same step, moved aside while a new one takes its name. Between
  the two renames it is the only one, so a reader accepts it in place of the missing `global_stepN`.
- `global_stepN.set_aside`: later than the step that the run went back to (`set_aside`). Only the user deletes it.

`latest.tmp` is the next `latest`, written before its checkpoint is renamed into place: if the run is killed before
`latest` moves, the new checkpoint still counts, even if there was no `latest` before.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from megatron.checkpoint.foreign import refuse_foreign
from megatron.checkpoint.manifest import MANIFEST_NAME, ManifestError, read_manifest, size_problems
from megatron.common.atomic_files import sync_file, sync_folder
from megatron.common.errors import CheckpointError, first_problems

logger = logging.getLogger(__name__)

LATEST = "latest"
PARTIAL = ".tmp"
REPLACED = ".replaced"
OPTIMIZER_FILE = re.compile(r"\w+_optim_states\.(safetensors|pt)")  # .pt: version 1 of the manifest, DeepSpeed's
_TAG = re.compile(r"global_step(\d+)")


def tag_name(iteration: int) -> str:
    return f"global_step{iteration}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None if it has none."""
    match = _TAG.match(folder.name)
    return int(match[1]) if match else None


def meta_file_name(model_rank: int) -> str:
    """Name of the file with a run's position and DeepSpeed's values; `model_rank` is pp_rank * tp + tp_rank."""
    return f"mp_rank_{model_rank:02d}_model_states.pt"


def steps_in(root: Path) -> list[int]:
    """Steps of the folders named `global_stepN` under `root`, ascending; they may be incomplete."""
    if not root.is_dir():
        return []
    matches = (_TAG.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def completeness_problems(folder: Path) -> list[str]:
    """Why a checkpoint with a manifest is not complete; empty if every listed file is there with its size."""
    try:
        return size_problems(folder, read_manifest(folder))
    except ManifestError as error:
        return [str(error)]


def complete_steps(root: Path) -> list[int]:
    """Steps under `root` whose folder has a manifest and every file it lists, ascending."""
    return [step for step in steps_in(root) if not completeness_problems(root / tag_name(step))]


def find_checkpoint(
    root: Path | str, iteration: int | None = None, options: str | None = None, *, sequential: bool = False
) -> Path:
    """The checkpoint folder to read: the one `latest` names, or that of `iteration`.

    `options` are the command-line options that read from `root` (default: `--load ROOT`), for messages that name a
    step. GPT-NeoX's `sequential` layout is refused unless the caller reads it.

    Saving moves `latest` last, so it names a complete checkpoint no matter when a run was killed. If it does not,
    something was lost since, and the user must choose: CheckpointError names what is missing and which steps are
    complete. A folder without a manifest (GPT-NeoX wrote it) is returned with a line in the log; its files are checked
    against the model's shape before anything is loaded.
    """
    root = Path(root)
    options = options or f"--load {root}"
    if not root.is_dir():
        raise CheckpointError(f"load: {root} is not a folder; give the folder that holds `latest` and `global_stepN`")
    if not (root / LATEST).exists() and not steps_in(root):
        refuse_foreign(root)
    tag = tag_name(iteration) if iteration is not None else _read_latest(root, options)
    folder = root / tag
    if not folder.exists() and (root / (tag + REPLACED)).is_dir():
        folder = root / (tag + REPLACED)
    if not folder.is_dir():
        asked = "`iteration` asks for it" if iteration is not None else f"{root / LATEST} names it"
        raise CheckpointError(f"{folder} does not exist, but {asked}; {_choices(root, options)}")
    if not (folder / MANIFEST_NAME).exists():
        refuse_foreign(folder, sequential)
        logger.info(
            f"{folder} has no {MANIFEST_NAME} (GPT-NeoX wrote it?): keys, shapes and shard counts are checked instead"
        )
        return folder
    problems = completeness_problems(folder)
    if problems:
        raise CheckpointError(f"{folder} is not complete: {first_problems(problems)}; {_choices(root, options)}")
    return folder


def _pending(root: Path) -> str | None:
    """The step that `latest` was about to name when a save was killed, if its checkpoint is complete."""
    try:
        tag = (root / (LATEST + PARTIAL)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    complete = _TAG.fullmatch(tag) and (root / tag).is_dir() and not completeness_problems(root / tag)
    return tag if complete else None


def _read_latest(root: Path, options: str) -> str:
    pending = _pending(root)
    if pending is not None:
        return pending
    try:
        tag = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise CheckpointError(
            f"{root / LATEST} cannot be read ({error.strerror}); {_choices(root, options)}"
        ) from error
    if not tag or Path(tag).name != tag:
        raise CheckpointError(
            f"{root / LATEST} holds {tag!r}, which is not the name of a checkpoint; {_choices(root, options)}"
        )
    return tag


def _choices(root: Path, options: str) -> str:
    steps = complete_steps(root)
    if not steps:
        return f"{root} holds no complete checkpoint"
    return f"complete in {root}: steps {', '.join(map(str, steps))} (choose one with {options} --iteration {steps[-1]})"


def publish(partial: Path, final: Path) -> None:
    """Rename a finished folder to `final`, then point `latest` at it; an older folder of that name is then removed."""
    replaced = final.with_name(final.name + REPLACED)
    latest = final.parent / LATEST
    pending = latest.with_name(LATEST + PARTIAL)
    sync_folder(partial)
    if final.exists():
        os.rename(final, replaced)
    pending.write_text(final.name + "\n")
    sync_file(pending)
    os.rename(partial, final)
    sync_folder(final.parent)
    os.replace(pending, latest)
    sync_folder(final.parent)
    if replaced.exists():
        remove(replaced)


def remove(folder: Path) -> None:
    """Delete a checkpoint; if killed on the way, the remains are named `.tmp` and no half checkpoint is left."""
    rubbish = folder.with_name(folder.name + PARTIAL)
    if rubbish.exists():
        shutil.rmtree(rubbish)
    os.rename(folder, rubbish)
    sync_folder(folder.parent)
    shutil.rmtree(rubbish)


def clean_leftovers(root: Path) -> None:
    """Clean up after killed saves in a folder that this run owns: restore or drop replaced ones, drop partial ones."""
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        tag = path.name.removesuffix(REPLACED)
        if not path.is_dir() or tag == path.name or not _TAG.fullmatch(tag):
            continue
        if (root / tag).exists():
            remove(path)
        else:
            logger.info(f"{path} takes its name {tag} back: the save that was to replace it did not finish")
            os.rename(path, root / tag)
            sync_folder(root)
    for path in sorted(root.iterdir()):
        tag = path.name.removesuffix(PARTIAL)
        if path.is_dir() and tag != path.name and _TAG.fullmatch(tag.removesuffix(REPLACED)):
            logger.info(f"{path} is removed: a save or a deletion that did not finish left it")
            shutil.rmtree(path)
    if _pending(root) is not None:  # killed while `latest` was about to move
        os.replace(root / (LATEST + PARTIAL), root / LATEST)
    (root / (LATEST + PARTIAL)).unlink(missing_ok=True)
