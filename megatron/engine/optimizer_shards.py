"""A rank's optimizer state as ranges of its tensors: the interface of every engine for saving and loading.

An engine may store its masters and moments in any way: flat, sharded over data-parallel ranks, by virtual stage. It
exposes them as views, one set for each contiguous part of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.common.errors import CheckpointError
from megatron.layout import TensorRange


@dataclass(frozen=True)
class OptimizerShard:
    """The state of one range on this rank: live fp32 views [stop - start] named master, exp_avg and exp_avg_sq.

    The next optimizer step changes them. `step` counts the updates so far. `copy` marks a tied matrix that another
    stage owns and saves.
    """

    where: TensorRange
    tensors: Mapping[str, Tensor]
    step: int
    copy: bool = False


ReadShard = Callable[[TensorRange, Mapping[str, Tensor]], int]
"""Fills the views of a range from a checkpoint and returns its `step`."""


def check_masters(where: TensorRange, weights: Tensor, master: Tensor) -> None:
    """Raise CheckpointError unless `weights` equal `master`, rounded, as after every step. Both are flat."""
    if not torch.equal(weights, master.to(weights.dtype)):
        raise CheckpointError(
            f"{where}: the fp32 masters in the optimizer files are not the weights in the layer files; these are of "
            "different checkpoints, or one of them was changed. Start from the weights with `no_load_optim: true`"
        )


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """torch AdamW's state of a parameter; created as the first step would create it, if there was none yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
    return state
