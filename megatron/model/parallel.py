"""Tensor parallelism, declared in one place: which matrix is cut along which dimension, over which group.

Attention and MLP each cut their first matrix by rows (column parallel: no communication forward) and their second
by columns (row parallel: one all-reduce forward), after Shoeybi et al. 2019. The matrices themselves are
megatron-core's; the embedding and the head are cut over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.layout import LayerFile, LlamaShape, file_rows


def _no_init(weight: Tensor) -> Tensor:
    return weight


class _PlainState:
    """Drops megatron-core's `_extra_state` entry: a layer file holds exactly GPT-NeoX's keys."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()  # type: ignore[attr-defined]  # it would add the entry again


class _ColumnLinear(_PlainState, ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _RowLinear(_PlainState, RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


@dataclass(frozen=True)
class TensorParallel:
    """Builds the parallel matrices of one tensor-parallel group. Weights are left uninitialised: every one of them
    is either read from a checkpoint or drawn by `megatron.model.initialize`."""

    group: ProcessGroup
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def _config(self) -> ModelParallelConfig:
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            params_dtype=self.dtype,
            use_cpu_initialization=True,  # allocate on the current torch device, not on "cuda:N"
            perform_initialization=False,
        )

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """[..., in] -> [..., out / tp]; weight [out / tp, in]."""
        return _ColumnLinear(
            in_features, out_features, config=self._config, init_method=_no_init, bias=False, tp_group=self.group
        )

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """[..., in / tp] -> [..., out], summed over the group; weight [out, in / tp]."""
        return _RowLinear(
            in_features,
            out_features,
            config=self._config,
            init_method=_no_init,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=self.group,
        )

    def embedding(self, rows: int, features: int) -> nn.Module:
        """ids -> [..., features]; weight [rows / tp, features]."""
        return VocabParallelEmbedding(rows, features, init_method=_no_init, config=self._config, tp_group=self.group)

    def tied_logits(self, x: Tensor, embedding: nn.Module) -> Tensor:
        """[..., features] -> [..., rows / tp] with the embedding's matrix, the head of a tied model."""
        return linear_with_grad_accumulation_and_async_allreduce(
            x,
            embedding.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.size > 1,
            sequence_parallel=False,
            tp_group=self.group,
        )


def mark_shards(layer: nn.Module, file: LayerFile, shape: LlamaShape) -> None:
    """Mark the parameters of which tensor-parallel ranks hold different parts, by the layout table, for the engine's
    gradient norm: it counts an unmarked parameter once per group. RuntimeError for one that the table does not know."""
    rows = {row.neox: row for row in file_rows(file, shape)}
    for name, parameter in layer.named_parameters():
        if name not in rows:
            raise RuntimeError(f"the layout table has no tensor {name} in {file.value} layers")
        if not rows[name].replicated:
            # the names by which DeepSpeed and megatron-core ask
            for attribute, value in (
                ("tensor_model_parallel", True),
                ("partition_dim", rows[name].shard_dim),
                ("partition_stride", 1),
            ):
                setattr(parameter, attribute, value)
