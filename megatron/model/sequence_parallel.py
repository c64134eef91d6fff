"""Sequence parallelism: between layers each tensor-parallel rank holds its slice of the sequence.

Korthikanti et al. 2022. Norms and residual additions then work on s / t tokens, and their activations take 1/t of the
memory. Before a column-parallel product the slices are all-gathered, after a row-parallel product the partial sums are
reduce-scattered; together they move as many bytes as the all-reduce that they replace. The gathered input is not
stored: the backward pass gathers it again, overlapped with the product that does not need it.

A replicated parameter, such as a norm's, gets the gradient of the rank's slice only: it must be summed over the ranks
once per step (`sum_over_slices`). Stages must exchange the slices as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class _Gathering:
    """An all-gather in flight: the ranks' slices along `dim` (0 or 1)."""

    def __init__(self, x: Tensor, group: ProcessGroup, dim: int) -> None:
        self._ranks, self._dim, self._source = group.size(), dim, x.contiguous()
        self._stacked = x.new_empty(self._ranks * x.shape[0], *x.shape[1:])
        self._work = dist.all_gather_into_tensor(self._stacked, self._source, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The whole sequence."""
        self._work.wait()
        stacked = self._stacked
        del self._stacked, self._source, self._work  # the work handle holds the tensors too
        if self._dim == 0:
            return stacked
        return stacked.unflatten(0, (self._ranks, -1)).transpose(0, 1).flatten(1, 2)


class _Scattering:
    """A reduce-scatter in flight: partial sums over the whole sequence, cut along `dim` (0 or 1)."""

    def __init__(self, x: Tensor, group: ProcessGroup, dim: int) -> None:
        ranks = group.size()
        if x.shape[dim] % ranks:
            raise ValueError(f"a sequence of {x.shape[dim]} tokens cannot be cut into {ranks} equal slices")
        stacked = x if dim == 0 else x.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1)
        self._source = stacked.contiguous()
        self._slice = x.new_empty(stacked.shape[0] // ranks, *stacked.shape[1:])
        self._work = dist.reduce_scatter_tensor(self._slice, self._source, group=group, async_op=True)

    def wait(self) -> Tensor:
        """This rank's slice of the sum."""
        self._work.wait()
        del self._source, self._work
        return self._slice


class GatherProduct(torch.autograd.Function):
    """All-gather x along `dim`, then multiply by the weight transposed: [.. s/t .., in], [out, in] -> [.. s .., out].

    Backward, in this order: the all-gather of x overlaps the product for the gradient of the whole input, and the
    reduce-scatter of that gradient overlaps the product for the weight's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        ctx.save_for_backward(x, weight)
        return F.linear(_Gathering(x, group, dim).wait(), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        for_input, for_weight = ctx.needs_input_grad[:2]
        gathering = _Gathering(x, ctx.group, ctx.dim) if for_weight else None
        whole_input_grad = grad @ weight if for_input else None
        whole_input = None if gathering is None else gathering.wait()
        scattering = None if whole_input_grad is None else _Scattering(whole_input_grad, ctx.group, ctx.dim)
        del whole_input_grad
        weight_grad = None
        if whole_input is not None:
            weight_grad = grad.flatten(0, -2).t() @ whole_input.flatten(0, -2)
        return None if scattering is None else scattering.wait(), weight_grad, None, None


class Gather(torch.autograd.Function):
    """This rank's slice [.. s/t .., features] -> the whole sequence, of which each rank uses some of the features.

    Backward therefore sums the ranks' gradients, and returns this rank's slice of the sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _Gathering(x, group, dim).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Scattering(grad, ctx.group, ctx.dim).wait(), None, None


class ScatterSum(torch.autograd.Function):
    """Partial sums of the ranks [.. s .., features] -> this rank's slice of their sum [.. s/t .., features]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _Scattering(x, group, dim).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gathering(grad, ctx.group, ctx.dim).wait(), None, None


class GatherLinear(nn.Module):
    """A column-parallel matrix: weight [out / t, in]; slices along `sequence_dim` -> [.. s .., out / t]."""

    def __init__(
        self, in_features: int, out_features: int, group: ProcessGroup, dtype: torch.dtype, sequence_dim: int
    ) -> None:
        super().__init__()
        self.group, self.sequence_dim = group, sequence_dim
        self.weight = nn.Parameter(torch.empty(out_features // group.size(), in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return GatherProduct.apply(x, self.weight, self.group, self.sequence_dim)


class ScatterLinear(nn.Module):
    """A row-parallel matrix: weight [out, in / t]; [.. s .., in / t] -> [.. s/t .., out], cut along `sequence_dim`."""

    def __init__(
        self, in_features: int, out_features: int, group: ProcessGroup, dtype: torch.dtype, sequence_dim: int = 0
    ) -> None:
        super().__init__()
        self.group, self.sequence_dim = group, sequence_dim
        self.weight = nn.Parameter(torch.empty(out_features, in_features // group.size(), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ScatterSum.apply(F.linear(x, self.weight), self.group, self.sequence_dim)


class ScatterEmbedding(nn.Module):
    """An embedding split over the vocabulary: weight [rows / t, features]; ids [b, s] -> [b, s/t, features]."""

    def __init__(self, rows: int, features: int, group: ProcessGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(rows // group.size(), features, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = ids - self.group.rank() * rows
        elsewhere = (local < 0) | (local >= rows)
        partial = F.embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return ScatterSum.apply(partial.masked_fill_(elsewhere.unsqueeze(-1), 0), self.group, 1)


@torch.no_grad()
def sum_over_slices(gradients: Sequence[Tensor], group: ProcessGroup) -> None:
    """Sum the gradients of replicated parameters over the ranks, in place and in one all-reduce."""
    if not gradients:
        return
    flat = torch.cat([gradient.view(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.view(-1).copy_(summed)
