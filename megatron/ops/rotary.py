"""Rotary position embedding, half-split: element i of a head turns with element i + d_rot/2 (Su et al., 2021,
arXiv:2104.09864, in the layout of GPT-NeoX and Hugging Face).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops.cpu_blocks import compute_dtype
from megatron.ops.library import use_kernels


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate `q` [s, b, heads, d] and `k` [s, b, kv_heads, d]; both may be strided views of one packed projection.

    `cos` and `sin` are fp32 tables [max_pos, d_rot/2], one column per frequency, made from fp64 angles; d_rot may be
    smaller than d (partial rotary), the rest of a head passes through. `positions` [b, s] are integers below
    max_pos, None means 0..s-1 for every sequence. Results are contiguous, in the dtype of `q` and `k`, rounded once.
    Raises ValueError if the shapes do not fit.
    """
    s, b, _, d = q.shape
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > d:
        raise ValueError(
            f"apply_rotary: tables have shapes {tuple(cos.shape)} and {tuple(sin.shape)}, expected two "
            f"[max_pos, d_rot/2] with d_rot at most the head size {d}"
        )
    if k.shape[:2] != (s, b) or k.shape[-1] != d:
        raise ValueError(f"apply_rotary: q is {tuple(q.shape)} and k {tuple(k.shape)}, expected [s, b, heads, d] both")
    if positions is None:
        if s > cos.shape[0]:
            raise ValueError(f"apply_rotary: {s} positions, tables hold {cos.shape[0]}; raise max_position_embeddings")
    elif positions.shape != (b, s):
        raise ValueError(f"apply_rotary: positions are {tuple(positions.shape)}, expected [b, s] = {(b, s)}")
    if use_kernels("apply_rotary", q, k):
        turned: tuple[Tensor, Tensor] = torch.ops.neox.rotary(q, k, cos, sin, positions, False)
        return turned
    if not torch.is_grad_enabled():
        cos2, sin1 = tables_of_tokens(cos, sin, positions, s, q)
        return reference_rotate(q, cos2, sin1, False), reference_rotate(k, cos2, sin1, False)
    return _Rotary.apply(q, k, cos, sin, positions)


def tables_of_tokens(cos: Tensor, sin: Tensor, positions: Tensor | None, s: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos twice side by side, sin) for every token, broadcastable to [s, b, heads, .]."""
    if positions is None:
        c, sn = cos[:s, None, None], sin[:s, None, None]
    else:
        index = positions.t()
        c, sn = cos[index][:, :, None], sin[index][:, :, None]
    dtype = compute_dtype(like)
    return torch.cat((c, c), -1).to(dtype), sn.to(dtype)


def reference_rotate(x: Tensor, cos2: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    """Rotate `x` [s, b, heads, d] by the token's angle, or back with `conjugate`."""
    half = sin.shape[-1]
    sign = -1.0 if conjugate else 1.0
    xf = x.to(sin.dtype)
    # One pass over whole heads, then one over each half: fewer and longer inner loops than four half passes.
    out = xf[..., : 2 * half] * cos2
    out[..., :half].addcmul_(xf[..., half : 2 * half], sin, value=-sign)
    out[..., half:].addcmul_(xf[..., :half], sin, value=sign)
    if 2 * half < x.shape[-1]:
        out = torch.cat((out, xf[..., 2 * half :]), -1)
    return out.to(x.dtype).contiguous()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        cos2, sin1 = tables_of_tokens(cos, sin, positions, q.shape[0], q)
        return reference_rotate(q, cos2, sin1, False), reference_rotate(k, cos2, sin1, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        cos, sin, positions = ctx.saved_tensors
        cos2, sin1 = tables_of_tokens(cos, sin, positions, dq.shape[0], dq)
        return reference_rotate(dq, cos2, sin1, True), reference_rotate(dk, cos2, sin1, True), None, None, None


# The compiled operators (csrc/rocm_kernels/rotary.cu): schema, shapes for tracing, gradients.

_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? positions, bool conjugate"
torch.library.define("neox::rotary", f"(Tensor q, Tensor k, {_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define("neox::rotary_", f"(Tensor(a!) q, Tensor(b!) k, {_ARGUMENTS}) -> ()")


@torch.library.register_fake("neox::rotary")
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, conjugate: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("neox::rotary_")
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, conjugate: bool) -> None:
    return None


def _save_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.conjugate = inputs
    ctx.save_for_backward(cos, sin, positions)


def _turn_back(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    q, k = torch.ops.neox.rotary(dq, dk, cos, sin, positions, not ctx.conjugate)
    return q, k, None, None, None, None


torch.library.register_autograd("neox::rotary", _turn_back, setup_context=_save_tables)
