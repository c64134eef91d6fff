"""Bytes of a checkpoint: the tensors of its files; everything else in it is negligible (docs/checkpoints.md)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron.layout import LlamaShape, layer_files, rank_shape
from megatron.planner.cost.moments import ELEMENT


@dataclass(frozen=True)
class CheckpointSize:
    weights: int  # layer files, one per layer and tensor-parallel rank
    optimizer: int  # fp32 masters and two moments of every tensor-parallel rank's tensors, each element once

    @property
    def total(self) -> int:
        return self.weights + self.optimizer


_STATE_BYTES = 3 * 4  # of one element


def checkpoint_size(shape: LlamaShape, tp: int, precision: str) -> CheckpointSize:
    """Size of a checkpoint, which does not depend on the pipeline and data-parallel sizes."""
    one_rank = sum(prod(rank_shape(row, shape, tp)) for _, _, rows in layer_files(shape) for row in rows)
    # An adapter is one file, which contains each tensor once.
    stored = shape.num_parameters if shape.frozen_base else tp * one_rank
    return CheckpointSize(
        weights=ELEMENT[precision] * stored,
        optimizer=_STATE_BYTES * tp * one_rank,
    )
