"""SwiGLU: up * silu(gate), read from one projection output (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.layout import split_up_gate
from megatron.ops.cpu_blocks import by_blocks, compute_dtype
from megatron.ops.library import use_kernels


def swiglu(fused: Tensor) -> Tensor:
    """up * silu(gate) of `fused` [..., 2 F] = [up | gate] (`megatron.layout.split_up_gate`); [..., F].

    Saves `fused` only. Raises ValueError if the last dimension is odd.
    """
    if fused.dim() == 0 or fused.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension of {tuple(fused.shape)} must hold up and gate, two equal halves")
    if use_kernels("swiglu", fused):
        out: Tensor = torch.ops.neox.swiglu.default(fused)
        return out
    if not torch.is_grad_enabled():  # an autograd function costs as much as a few rows
        return reference_swiglu(fused.reshape(-1, fused.shape[-1])).view(*fused.shape[:-1], -1)
    return _SwiGlu.apply(fused)


def reference_swiglu(fused: Tensor) -> Tensor:
    """[rows, F] of a matrix `fused` [rows, 2 F]."""

    def formula(fused: Tensor) -> tuple[Tensor]:
        up, gate = split_up_gate(fused.to(compute_dtype(fused)))
        return ((up * torch.nn.functional.silu(gate)).to(fused.dtype),)

    return by_blocks(formula, fused)[0]


def reference_swiglu_backward(dout: Tensor, fused: Tensor) -> Tensor:
    """Gradient [rows, 2 F] of `fused`: dup = dout silu(gate), dgate = dout up silu'(gate)."""

    def formula(fused: Tensor, dout: Tensor) -> tuple[Tensor]:
        up, gate = split_up_gate(fused.to(compute_dtype(fused)))
        dgate = torch.ops.aten.silu_backward(dout * up, gate)
        return (torch.cat((dout * torch.nn.functional.silu(gate), dgate), -1).to(fused.dtype),)

    return by_blocks(formula, fused, dout)[0]


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor) -> Tensor:
        ctx.save_for_backward(fused)
        return reference_swiglu(fused.reshape(-1, fused.shape[-1])).view(*fused.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (fused,) = ctx.saved_tensors
        rows = fused.reshape(-1, fused.shape[-1])
        return reference_swiglu_backward(dout.reshape(rows.shape[0], -1), rows).view(fused.shape)


# The compiled operators (csrc/rocm_kernels/swiglu.cu): schema and shapes for tracing; gradients are in autograd.cpp.

torch.library.define("neox::swiglu", "(Tensor fused) -> Tensor")
torch.library.define("neox::swiglu_backward", "(Tensor dout, Tensor fused) -> Tensor")


@torch.library.register_fake("neox::swiglu")
def _(fused: Tensor) -> Tensor:
    return fused.new_empty(*fused.shape[:-1], fused.shape[-1] // 2)


@torch.library.register_fake("neox::swiglu_backward")
def _(dout: Tensor, fused: Tensor) -> Tensor:
    return torch.empty_like(fused, memory_format=torch.contiguous_format)
