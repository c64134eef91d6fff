"""The optimizer's state of a rank as ranges of its tensors: what every engine gives to a save and takes from a load.

An engine may keep its masters and moments however it likes: flat, sharded over data-parallel ranks, one virtual stage
after another. What it shows of them are views, one for each contiguous part of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron.layout import TensorRange


@dataclass(frozen=True)
class OptimizerShard:
    """The state of one range on this rank: live fp32 views [stop - start] named master, exp_avg and exp_avg_sq.

    The next step changes them. `step` counts the updates done. `copy` marks a tied matrix that another stage owns, and
    whose state that stage saves.
    """

    where: TensorRange
    tensors: Mapping[str, Tensor]
    step: int
    copy: bool = False


ReadShard = Callable[[TensorRange, Mapping[str, Tensor]], int]
"""Fills the views of a range from a checkpoint and returns its `step`."""
