"""RMSNorm and residual add + RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

Arithmetic is fp32 (fp64 for fp64) from the input to one rounding at the end. `hf_rounding` instead rounds the
normalized row to the input's dtype before the weight multiply, which is what transformers' LlamaRMSNorm does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops.cpu_blocks import compute_dtype, rows_per_block
from megatron.ops.library import use_kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float, hf_rounding: bool = False) -> Tensor:
    """RMSNorm of `x` [..., width] with `weight` [width]; the result has the shape and dtype of `x`.

    Saves `x` and one fp32 number per row for the backward pass. Raises ValueError if the shapes do not match.
    """
    _check(x, weight)
    if use_kernels("rms_norm", x, weight):
        y: Tensor = torch.ops.neox.rms_norm.default(x, weight, eps, hf_rounding)[0]
        return y
    if not torch.is_grad_enabled():  # an autograd function costs as much as a norm of a few rows
        rows = x.reshape(-1, x.shape[-1])
        if not hf_rounding and len(rows) <= rows_per_block(rows):  # and so do the loops over blocks
            return _norm_of_one_block(rows, weight, eps).view(x.shape)
        return reference_norm(rows, weight, eps, hf_rounding)[0].view(x.shape)
    return _RmsNorm.apply(x, weight, eps, hf_rounding)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, hf_rounding: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (sum, y): `sum = x + residual`, rounded to their dtype, and `y = rms_norm(sum, weight, eps)`.

    Because y is computed from the rounded sum, both equal the results of the two separate operations bit for bit, and
    the backward pass can use the sum that the residual stream keeps anyway.
    """
    _check(x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm: x is {x.dtype} {tuple(x.shape)} and residual {residual.dtype} {tuple(residual.shape)}; "
            f"give two tensors of one shape and dtype"
        )
    if use_kernels("add_rms_norm", x, residual, weight):
        total, y, _ = torch.ops.neox.add_rms_norm.default(x, residual, weight, eps, hf_rounding)
        return total, y
    if not torch.is_grad_enabled():
        total = x + residual
        return total, rms_norm(total, weight, eps, hf_rounding)
    return _AddRmsNorm.apply(x, residual, weight, eps, hf_rounding)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, the input's last dimension is {tuple(x.shape)[-1:]}; "
            f"give one weight per column"
        )


def _norm_of_one_block(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y of `reference_norm` for `x` [rows, width] without the loop: the same operations in the same order."""
    dtype = compute_dtype(x)
    xf = x.to(dtype)
    rstd = torch.linalg.vector_norm(xf, dim=-1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()
    return torch.mul(xf, rstd).mul_(weight.to(dtype)).to(x.dtype)


def reference_norm(x: Tensor, weight: Tensor, eps: float, hf_rounding: bool) -> tuple[Tensor, Tensor]:
    """(y [rows, width], rstd [rows]) of a matrix `x`; rstd in the compute dtype."""
    dtype = compute_dtype(x)
    w = weight.to(dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[0], 1, dtype=dtype)
    block = rows_per_block(x)
    for xs, ys, rs in zip(x.split(block), y.split(block), rstd.split(block), strict=True):
        xf = xs.to(dtype)
        if hf_rounding:
            # The same reduction as HF: another order of summation could flip the last bit of a bf16 result.
            torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps, out=rs)
            torch.mul(weight, (xf * rs).to(x.dtype).to(torch.promote_types(x.dtype, weight.dtype)), out=ys)
            continue
        norm = torch.linalg.vector_norm(xf, dim=-1, keepdim=True)
        torch.rsqrt(norm.square_().div_(x.shape[1]).add_(eps), out=rs)
        if ys.dtype == dtype:
            torch.mul(xf, rs, out=ys).mul_(w)
        else:
            ys.copy_((xf * rs).mul_(w))
    return y, rstd[:, 0]


def reference_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, hf_rounding: bool
) -> tuple[Tensor, Tensor]:
    """(dx [rows, width] in x's dtype, dW [width] in the compute dtype) for matrices; `dsum` is added to dx.

    With xhat = x rstd and c = mean(xhat w dy): dx = rstd (w dy - xhat c), dW = sum over rows of dy xhat. Computed in
    blocks and in place: on the CPU that is ten times as fast as autograd through the forward pass.
    """
    dtype = compute_dtype(x)
    w = weight.to(dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw = torch.zeros_like(w)
    block = rows_per_block(x)
    dsums = dx.split(block) if dsum is None else dsum.split(block)
    for xs, gs, rs, ds, out in zip(
        x.split(block), dy.split(block), rstd.split(block), dsums, dx.split(block), strict=True
    ):
        xf, gf = xs.to(dtype), gs.to(dtype)
        t = torch.mul(xf, gf, out=out) if out.dtype == dtype else xf * gf
        c = torch.mv(t, w).mul_(rs.pow(3)).div_(-x.shape[1])
        if hf_rounding and x.dtype != dtype:
            dw += ((xf * rs[:, None]).to(x.dtype).to(dtype) * gf).sum(0)
        else:
            dw.addmv_(t.t(), rs)
        torch.mul(gf, w, out=t)
        t.mul_(rs[:, None]).addcmul_(xf, c[:, None])
        if dsum is not None:
            t.add_(ds)
        if out.dtype != dtype:
            out.copy_(t)
    return dx, dw


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, hf_rounding: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, rstd = reference_norm(rows, weight, eps, hf_rounding)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.hf_rounding = hf_rounding
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, rstd = ctx.saved_tensors
        dx, dw = reference_norm_backward(dy.reshape(rows.shape), rows, weight, rstd, None, ctx.hf_rounding)
        return dx.view(dy.shape), dw.to(weight.dtype), None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, hf_rounding: bool
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        rows = total.reshape(-1, x.shape[-1])
        y, rstd = reference_norm(rows, weight, eps, hf_rounding)
        ctx.save_for_backward(total, weight, rstd)
        ctx.hf_rounding = hf_rounding
        ctx.set_materialize_grads(False)
        return total, y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dsum, dsum, None, None, None
        rows = total.reshape(-1, total.shape[-1])
        extra = None if dsum is None else dsum.reshape(rows.shape)
        dx, dw = reference_norm_backward(dy.reshape(rows.shape), rows, weight, rstd, extra, ctx.hf_rounding)
        dx = dx.view(total.shape)
        return dx, dx, dw.to(weight.dtype), None, None


# The compiled operators (csrc/rocm_kernels/rms_norm*.cu): schema and shapes for tracing; gradients are in autograd.cpp.

torch.library.define("neox::rms_norm", "(Tensor x, Tensor weight, float eps, bool hf_rounding) -> (Tensor, Tensor)")
torch.library.define(
    "neox::add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps, bool hf_rounding) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "neox::rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dsum, bool hf_rounding) -> (Tensor, Tensor)",
)


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("neox::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, hf_rounding: bool) -> tuple[Tensor, Tensor]:
    return _dense_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.register_fake("neox::add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, hf_rounding: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _dense_like(x), _dense_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.register_fake("neox::rms_norm_backward")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, hf_rounding: bool
) -> tuple[Tensor, Tensor]:
    return _dense_like(x), _dense_like(weight)
