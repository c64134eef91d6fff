"""Tensor parallelism, declared in one place: which matrix is split along which dimension, over which group.

Attention and MLP each split their first matrix by rows (column-parallel: no communication in the forward pass) and
their second by columns (row-parallel: one all-reduce in the forward pass), after Shoeybi et al. 2019. The embedding and
the head are split over the vocabulary. The modules are megatron-core's, or with sequence parallelism those of
`megatron.model.sequence_parallel`, which have the same parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.model.sequence_parallel import GatherLinear, GatherProduct, ScatterEmbedding, ScatterLinear


def _no_init(weight: Tensor) -> Tensor:
    return weight


class _PlainState:
    """Mixin that drops megatron-core's `_extra_state` entry: a layer file holds exactly GPT-NeoX's keys."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()  # type: ignore[attr-defined]  # it would add the entry again


# Without gradients both reduce to a plain product. Generating token by token, megatron-core's bookkeeping would take as
# long as the product with a small matrix.


class _ColumnLinear(_PlainState, ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0] if torch.is_grad_enabled() else F.linear(x, self.weight)


class _RowLinear(_PlainState, RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)[0]
        product = F.linear(x, self.weight)
        if self.tp_group.size() > 1:
            dist.all_reduce(product, group=self.tp_group)
        return product


@dataclass(frozen=True)
class TensorParallel:
    """Builds the parallel matrices of one tensor-parallel group. Weights are left uninitialized: they are either read
    from a checkpoint or drawn by `megatron.model.initialize`.

    With `sequence_parallel`, hidden states between layers are this rank's slice of the sequence, s / tp tokens.
    """

    group: ProcessGroup
    dtype: torch.dtype
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def padded_length(self, seq_length: int) -> int:
        """The smallest sequence length >= `seq_length` that can be sliced over the ranks."""
        multiple = self.size if self.sequence_parallel else 1
        return -(-seq_length // multiple) * multiple

    def own_slice(self, x: Tensor, sequence_dim: int) -> Tensor:
        """This rank's slice of a sequence that is replicated on all ranks; the whole without sequence parallelism."""
        return x.chunk(self.size, sequence_dim)[self.rank] if self.sequence_parallel else x

    @property
    def _config(self) -> ModelParallelConfig:
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            params_dtype=self.dtype,
            use_cpu_initialization=True,  # allocate on the current torch device, not on "cuda:N"
            perform_initialization=False,
        )

    def column(self, in_features: int, out_features: int, sequence_dim: int = 0) -> nn.Module:
        """[..., in] -> [..., out / tp]; weight [out / tp, in]. `sequence_dim` (0 or 1) is the sequence's dimension."""
        if self.sequence_parallel:
            return GatherLinear(in_features, out_features, self.group, self.dtype, sequence_dim)
        linear = _ColumnLinear(
            in_features, out_features, config=self._config, init_method=_no_init, bias=False, tp_group=self.group
        )
        return linear

    def row(self, in_features: int, out_features: int, sequence_dim: int = 0) -> nn.Module:
        """[..., in / tp] -> [..., out], summed over the group; weight [out, in / tp]."""
        if self.sequence_parallel:
            return ScatterLinear(in_features, out_features, self.group, self.dtype, sequence_dim)
        linear = _RowLinear(
            in_features,
            out_features,
            config=self._config,
            init_method=_no_init,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=self.group,
        )
        return linear

    def embedding(self, rows: int, features: int) -> nn.Module:
        """ids [b, s] -> [b, s, features]; weight [rows / tp, features]."""
        if self.sequence_parallel:
            return ScatterEmbedding(rows, features, self.group, self.dtype)
        embedding = VocabParallelEmbedding(
            rows, features, init_method=_no_init, config=self._config, tp_group=self.group
        )
        return embedding

    def tied_logits(self, x: Tensor, embedding: nn.Module) -> Tensor:
        """[b, s, features] -> [b, s, rows / tp]: the head of a tied model, which uses the embedding's matrix."""
        if self.sequence_parallel:
            return GatherProduct.apply(x, embedding.weight, self.group, 1)
        return linear_with_grad_accumulation_and_async_allreduce(
            x,
            embedding.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.size > 1,
            sequence_parallel=False,
            tp_group=self.group,
        )
