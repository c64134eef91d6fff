"""Keys of checkpoints: where from, where to, how often, how many."""

from __future__ import annotations

from typing import Literal

from megatron.neox_arguments.keys.fields import Keys, key


class CheckpointKeys(Keys):
    load: str | None = key(None, "Folder to start or continue from; training needs this or from_scratch.")
    save: str | None = key(None, "Folder for checkpoints; needs checkpoint_factor or extra_save_iters.")
    iteration: int | None = key(None, "Checkpoint to load instead of the latest.", ge=0)
    from_scratch: bool = key(False, "Start from random weights. Never happens unasked.", ours=True)
    finetune: bool = key(False, "Load weights only and start at iteration 0.")
    no_load_optim: bool = key(False, "Do not load optimizer states.")
    no_load_rng: bool = key(False, "Do not load random number generator states.")
    no_save_rng: bool = key(False, "Do not save random number generator states.")
    checkpoint_factor: int | None = key(None, "Save every this many iterations.", gt=0)
    checkpoint_scale: Literal["linear"] = key("linear", "Spacing of checkpoints.")
    extra_save_iters: list[int] = key([], "Further iterations to save at; 0 is before the first step.")
    async_save: bool = key(
        False,
        "Go on with training while a checkpoint is written from a copy in host memory; a failed write is reported "
        "and does not end the run.",
        ours=True,
    )
    keep_last_n_checkpoints: int | None = key(None, "Older checkpoints are deleted.", gt=0)
    keep_optimizer_last_n: int | None = key(
        None,
        "Optimizer states are kept in only this many checkpoints (70B: 847 GB each); weights stay.",
        ours=True,
        ge=0,
    )
    allow_high_initial_loss: bool = key(
        False, "Go on although the first loss of a loaded model is near that of a random one.", ours=True
    )
