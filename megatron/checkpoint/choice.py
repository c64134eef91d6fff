"""Which checkpoint a run starts from, decided from its keys and its folders alone. Without torch.

A batch system requeues the same script, and `load: converted weights, finetune: true` would start at iteration 0 every
time. So a run whose `save` folder holds its checkpoints continues from the last of them, and logs this. An explicit
`iteration` takes precedence: the run goes back to that step of its own. A job that Slurm has requeued after it saved
does not go back a second time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron.checkpoint.discovery import LATEST, REPLACED, complete_steps, steps_in, tag_name
from megatron.checkpoint.manifest import ManifestError, read_manifest
from megatron.checkpoint.provenance import TRAINING
from megatron.common.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs

Restored = Literal["everything", "weights and position", "weights"]


@dataclass(frozen=True)
class StartChoice:
    """The folder to look in, the step (None: the one that `latest` names), what to restore, and notes for the user."""

    root: Path
    iteration: int | None
    restored: Restored
    own_save: bool = False
    notes: tuple[str, ...] = ()


def choose_start(args: NeoXArgs, env: Mapping[str, str] = os.environ) -> StartChoice | None:
    """Choose where to start; None: from scratch. CheckpointError if the run in `save` lacks `iteration`."""
    if args.lora is not None:
        return _beside_a_base(args, env)
    restored: Restored = "weights" if args.finetune else "weights and position" if args.no_load_optim else "everything"
    load = None if args.load is None else Path(args.load)
    save = Path(args.save) if args.save and _holds_checkpoints(Path(args.save)) else None
    if save is None:
        return None if load is None else StartChoice(load, args.iteration, restored, _same(args))
    if _same(args):
        return _from_own_load(args, save, restored, env)
    first = "from_scratch" if load is None else f"load: {load}"
    if args.iteration is None or _requeued(save, env):
        note = f"{save} holds checkpoints of this run: it continues from the last one ({first} was for its first start)"
        return StartChoice(save, None, "everything", True, (note,))
    wanted = args.iteration
    if load is not None and wanted in complete_steps(load):
        note = (
            f"{save} holds checkpoints of this run: it continues from the last one (iteration {wanted} is a step of "
            f"load: {load}, which was for its first start; to go back to one of its own: {own_options(args)} "
            f"--iteration N)"
        )
        return StartChoice(save, None, "everything", True, (note,))
    if wanted in steps_in(save):
        note = f"the run goes back to iteration {wanted} of its own checkpoints in {save}, as `iteration` says"
        return StartChoice(save, wanted, "everything", True, (note,))
    also = "" if load is None else f" and not in load: {load}"
    raise CheckpointError(
        f"iteration {wanted} is not in {save}, the folder of this run{also}; "
        f"complete in {save}: steps {', '.join(map(str, complete_steps(save))) or 'none'}"
    )


def _beside_a_base(args: NeoXArgs, env: Mapping[str, str]) -> StartChoice | None:
    """With `lora`: `load` is the base, read for its weights only, and `save` holds the run's own checkpoints."""
    assert args.load is not None  # the rule start_is_given
    load, save = Path(args.load), None if args.save is None else Path(args.save)
    if save is None or not _holds_checkpoints(save):
        return StartChoice(load, args.iteration, "weights")
    restored: Restored = "weights and position" if args.no_load_optim else "everything"
    wanted = args.iteration
    if wanted is None or _requeued(save, env) or wanted in complete_steps(load):
        note = f"{save} holds checkpoints of this run: its adapter continues from the last one, beside {load}"
        return StartChoice(save, None, restored, True, (note,))
    note = f"the run goes back to iteration {wanted} of its own checkpoints in {save}, as `iteration` says"
    return StartChoice(save, wanted, restored, True, (note,))


def _from_own_load(args: NeoXArgs, save: Path, restored: Restored, env: Mapping[str, str]) -> StartChoice:
    """`load` names the save folder itself."""
    if _requeued(save, env):
        note = f"{save}: the requeued job continues from its own last checkpoint"
        return StartChoice(save, None, "everything", True, (note,))
    if args.finetune and any(_written_by_training(save / tag_name(step)) for step in steps_in(save)):
        note = (
            f"{save} holds checkpoints of this run: it continues from the last one (finetune was for its first start; "
            f"to begin anew from its weights, give another save folder)"
        )
        return StartChoice(save, args.iteration, "everything", True, (note,))
    return StartChoice(save, args.iteration, restored, True)


def own_options(args: NeoXArgs) -> str:
    """Options that make a run resume its own checkpoints as asked, whatever its YAML says for a first start."""
    if args.lora is not None:  # `load` is the base
        return f"--save {args.save}"
    undone = ["--from_scratch false"] * args.from_scratch + ["--finetune false"] * args.finetune
    return " ".join([f"--load {args.save}", *undone])


def _same(args: NeoXArgs) -> bool:
    return args.load is not None and args.save is not None and Path(args.load).resolve() == Path(args.save).resolve()


def _holds_checkpoints(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return (folder / LATEST).is_file() or bool(steps_in(folder)) or any(folder.glob(f"global_step*{REPLACED}"))


def _requeued(save: Path, env: Mapping[str, str]) -> bool:
    """Whether Slurm has restarted this job after it saved into the folder."""
    if int("0" + "".join(filter(str.isdigit, env.get("SLURM_RESTART_COUNT", "")))) == 0:
        return False
    steps = complete_steps(save)
    return bool(steps) and read_manifest(save / tag_name(steps[-1])).provenance.get("job") == env.get("SLURM_JOB_ID")


def _written_by_training(folder: Path) -> bool:
    try:
        return read_manifest(folder).provenance.get("written_by") == TRAINING
    except ManifestError:
        return False
