"""SwiGLU: up * silu(gate), read from one projection output (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.layout import split_up_gate
from megatron.ops.cpu_blocks import compute_dtype, rows_per_block
from megatron.ops.library import use_kernels

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


def swiglu(fused: Tensor) -> Tensor:
    """up * silu(gate) [..., F] of `fused` [..., 2 F] = [up | gate] (`megatron.layout.split_up_gate`).

    Saves only `fused` for the backward pass. Raises ValueError if the last dimension is odd.
    """
    if fused.dim() == 0 or fused.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension of {tuple(fused.shape)} must hold up and gate, two equal halves")
    if use_kernels("swiglu", fused):
        out: Tensor = torch.ops.neox.swiglu.default(fused)
        return out
    if not torch.is_grad_enabled():
        rows = fused.reshape(-1, fused.shape[-1])
        if fused.dtype == compute_dtype(fused) and 2 * len(rows) <= rows_per_block(rows):
            up, gate = split_up_gate(fused)  # for a few rows the loop over blocks would double the cost
            return torch.nn.functional.silu(gate).mul_(up)
        return reference_swiglu(rows).view(*fused.shape[:-1], -1)
    return _SwiGlu.apply(fused)


def reference_swiglu(fused: Tensor) -> Tensor:
    """up * silu(gate) [rows, F] of a matrix `fused` [rows, 2 F]."""
    dtype = compute_dtype(fused)
    out = fused.new_empty(fused.shape[0], fused.shape[1] // 2)
    block = rows_per_block(out)
    for fs, os in zip(fused.split(block), out.split(block), strict=True):
        up, gate = split_up_gate(fs.to(dtype))
        if os.dtype == dtype:
            _silu(gate, out=os).mul_(up)
        else:
            os.copy_(torch.nn.functional.silu(gate).mul_(up))
    return out


def reference_swiglu_backward(dout: Tensor, fused: Tensor) -> Tensor:
    """Gradient [rows, 2 F] of `fused`: dup = dout silu(gate), dgate = dout up silu'(gate).

    Computed in place, a block of rows at a time: on the CPU two to three times as fast as autograd.
    """
    dtype = compute_dtype(fused)
    if torch.compiler.is_compiling():  # Dynamo refuses strided `out=`, and fuses this by itself
        up, gate = split_up_gate(fused.to(dtype))
        s = torch.sigmoid(gate)
        ds = dout.to(dtype) * s
        return torch.cat((ds * gate, ds * up * (1 + gate * (1 - s))), -1).to(fused.dtype)
    grad = torch.empty_like(fused, memory_format=torch.contiguous_format)
    block = rows_per_block(dout)
    for fs, gs, os in zip(fused.split(block), grad.split(block), dout.split(block), strict=True):
        up, gate = split_up_gate(fs.to(dtype))
        of = os.to(dtype)
        work = gs if gs.dtype == dtype else torch.empty_like(fs, dtype=dtype)
        dup, dgate = split_up_gate(work)
        _silu(gate, out=dup).mul_(of)
        _silu_backward(of * up, gate, grad_input=dgate)
        if work is not gs:
            gs.copy_(work)
    return grad


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
