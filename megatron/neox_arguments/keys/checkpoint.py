"""Keys of checkpoints and their rules: what to load, where to save, how often, how many to keep."""

from __future__ import annotations

from typing import Literal

from megatron.neox_arguments.keys.fields import Keys, key
from megatron.neox_arguments.registry import Registry

registry = Registry()


class CheckpointKeys(Keys):
    load: str | None = key(None, "Checkpoint folder to start or continue from; training needs load or from_scratch.")
    save: str | None = key(None, "Folder for checkpoints; needs checkpoint_factor or extra_save_iters.")
    iteration: int | None = key(None, "Iteration of the checkpoint to load, instead of the latest.", ge=0)
    from_scratch: bool = key(False, "Start from random weights, which never happens implicitly.", ours=True)
    finetune: bool = key(False, "Load weights only and start at iteration 0.")
    no_load_optim: bool = key(False, "Do not load optimizer states.")
    no_load_rng: bool = key(False, "Do not load random number generator states.")
    no_save_rng: bool = key(False, "Do not save random number generator states.")
    checkpoint_factor: int | float | None = key(
        None,
        "Iterations between checkpoints; with checkpoint_scale: log, the number at whose powers checkpoints are saved, "
        "which may be fractional.",
        gt=0,
    )
    checkpoint_scale: Literal["linear", "log"] = key(
        "linear", "Spacing of checkpoints: equal (linear), or growing by checkpoint_factor (log)."
    )
    exit_interval: int | None = key(
        None, "End the run at the next iteration that is a multiple of this, with everything saved.", gt=0
    )
    extra_save_iters: list[int] = key([], "Additional iterations to save at; 0 is before the first step.")
    async_save: bool = key(
        False,
        "Write checkpoints in the background, from a copy in host memory; a failed write is reported but does not end "
        "the run.",
        ours=True,
    )
    keep_last_n_checkpoints: int | None = key(
        None, "Number of checkpoints to keep; older ones are deleted. Default: all.", gt=0
    )
    keep_optimizer_last_n: int | None = key(
        None,
        "Number of checkpoints that keep their optimizer states (70B: 847 GB each); older ones keep only the weights. "
        "Default: all.",
        ours=True,
        ge=0,
    )
    allow_model_changes: list[Literal["rms_norm_epsilon", "rotary_emb_base", "rope_scaling"]] = key(
        [],
        "Model settings that may differ from those in the loaded checkpoint, such as [rotary_emb_base] for a "
        "longer context; any other difference stops the run.",
        ours=True,
    )
    allow_high_initial_loss: bool = key(
        False, "Continue even if the first loss of a loaded model is near that of a random one.", ours=True
    )


# --- rules


@registry.rule("train")
def start_is_given(args: CheckpointKeys) -> str | None:
    if args.load and args.from_scratch:
        return "load and from_scratch are mutually exclusive; keep the one you mean"
    if args.load or args.from_scratch:
        return None
    return (
        "nothing to start from: give load (a checkpoint folder) or from_scratch: true. A run never starts "
        "silently from random weights"
    )


@registry.rule("eval", "generate", "mcq")
def weights_are_given(args: CheckpointKeys) -> str | None:
    return None if args.load else "nothing to evaluate: give load, the folder of a checkpoint"


@registry.rule("train")
def saving_has_an_interval(args: CheckpointKeys) -> str | None:
    if not args.save or args.checkpoint_factor or args.extra_save_iters:
        return None
    return "save is given without checkpoint_factor or extra_save_iters, which determine when to save"


@registry.rule("train")
def factor_fits_the_scale(args: CheckpointKeys) -> str | None:
    factor = args.checkpoint_factor
    if factor is None or (factor > 1 if args.checkpoint_scale == "log" else factor == int(factor)):
        return None
    if args.checkpoint_scale == "log":
        return f"checkpoint_factor {factor} with checkpoint_scale: log must be above 1, as saves are at its powers"
    return f"checkpoint_factor {factor} is not a whole number of iterations; fractions are for checkpoint_scale: log"


@registry.warning("train")
def nothing_is_saved(args: CheckpointKeys) -> str | None:
    if args.save:
        return None
    return "save is not given: this run writes no checkpoint" + (
        ", async_save has no effect" if args.async_save else ""
    )


@registry.rule("train")
def iteration_needs_load(args: CheckpointKeys) -> str | None:
    if args.iteration is None or args.load or args.save:
        return None
    return (
        f"iteration {args.iteration} selects a checkpoint, but neither load nor save is given to look for it in; "
        f"leave it out, or add --load FOLDER --from_scratch false"
    )
