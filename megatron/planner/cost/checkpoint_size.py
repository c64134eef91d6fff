"""Bytes of a checkpoint: the tensors of its files, beside which all else in it is small (docs/checkpoints.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megatron.layout import LlamaShape, layer_files, rank_shape
from megatron.planner.cost.memory import ELEMENT, StageMemory
from megatron.planner.cost.parallel_layout import ParallelLayout


@dataclass(frozen=True)
class CheckpointSize:
    weights: int  # layer files, one per layer and tensor-parallel rank
    optimizer: int  # fp32 masters and two moments, one file per rank, padded as DeepSpeed pads them

    @property
    def total(self) -> int:
        return self.weights + self.optimizer


def checkpoint_size(
    shape: LlamaShape, layout: ParallelLayout, precision: str, stages: Sequence[StageMemory]
) -> CheckpointSize:
    """Size of a checkpoint of a run that holds `stages` (`plan_memory`)."""
    one_rank = sum(prod(rank_shape(row, shape, layout.tensor)) for _, _, rows in layer_files(shape) for row in rows)
    return CheckpointSize(
        weights=ELEMENT[precision] * layout.tensor * one_rank,
        optimizer=layout.tensor * layout.data * sum(stage.optimizer for stage in stages),
    )
