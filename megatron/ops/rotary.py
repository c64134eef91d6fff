"""Rotary position embedding, half-split: element i of a head turns with element i + d/2 (Su et al., 2021,
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

    `cos` and `sin` are fp32 tables [max_pos, d/2], one column per frequency. `positions` [b, s] are integers below
    max_pos; None means 0..s-1 for every sequence. Results are contiguous, in the dtype of `q` and `k`, rounded once.
    Raises ValueError if the shapes do not match.
    """
    s, b, _, d = q.shape
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] != d:
        raise ValueError(
            f"apply_rotary: tables have shapes {tuple(cos.shape)} and {tuple(sin.shape)}, expected two "
            f"[max_pos, {d // 2}] for heads of {d}"
        )
    if k.shape[:2] != (s, b) or k.shape[-1] != d:
        raise ValueError(f"apply_rotary: q is {tuple(q.shape)} and k {tuple(k.shape)}, expected [s, b, heads, d] both")
    if positions is None:
        if s > cos.shape[0]:
            raise ValueError(f"apply_rotary: {s} positions, tables hold {cos.shape[0]}; raise max_position_embeddings")
    elif positions.shape != (b, s):
        raise ValueError(f"apply_rotary: positions are {tuple(positions.shape)}, expected [b, s] = {(b, s)}")
    if use_kernels("apply_rotary", q, k):
        turned: tuple[Tensor, Tensor] = torch.ops.neox.rotary.default(q, k, cos, sin, positions, False)
        return turned
    if not torch.is_grad_enabled():
        turns = tables_of_tokens(cos, sin, positions, s, q)
        return reference_rotate(q, *turns, False), reference_rotate(k, *turns, False)
    return _Rotary.apply(q, k, cos, sin, positions)


def tables_of_tokens(cos: Tensor, sin: Tensor, positions: Tensor | None, s: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos repeated for both halves of a head, sin) of every token, broadcastable to [s, b, heads, .]."""
    if positions is None:
        c, sn = cos[:s, None, None], sin[:s, None, None]
    else:
        index = positions.t()
        c, sn = cos[index][:, :, None], sin[index][:, :, None]
    dtype = compute_dtype(like)
    return torch.cat((c, c), -1).to(dtype), sn.to(dtype)


def reference_rotate(x: Tensor, cos2: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    """Rotate `x` [s, b, heads, d] by each token's angles, or back with `conjugate`; contiguous."""
    sign = -1.0 if conjugate else 1.0
    xf = x.to(sin.dtype)
    x1, x2 = xf.chunk(2, -1)
    # One pass over whole heads, then one over each half: few long inner loops are fastest on a CPU.
    out = xf * cos2
    y1, y2 = out.chunk(2, -1)
    y1.addcmul_(x2, sin, value=-sign)
    y2.addcmul_(x1, sin, value=sign)
    return out.to(x.dtype).contiguous()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        turns = tables_of_tokens(cos, sin, positions, q.shape[0], q)
        return reference_rotate(q, *turns, False), reference_rotate(k, *turns, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        cos, sin, positions = ctx.saved_tensors
        turns = tables_of_tokens(cos, sin, positions, dq.shape[0], dq)
        return reference_rotate(dq, *turns, True), reference_rotate(dk, *turns, True), None, None, None


# The compiled operators (csrc/rocm_kernels/rotary.cu): schema and shapes for tracing; gradients are in autograd.cpp.

torch.library.define(
    "neox::rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool conjugate) -> (Tensor, Tensor)",
)


@torch.library.register_fake("neox::rotary")
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, conjugate: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)
