"""The Llama decoder, top to bottom (Touvron et al. 2023; Llama-3.1: grouped-query attention, scaled rotary).

Shapes: s sequence, b micro-batch, h hidden, V padded vocabulary; a tensor-parallel rank holds n query heads, m key
and value heads of d dimensions, and f of the MLP's inner features. Between layers the hidden states are [s, b, h]. With
sequence parallelism over t ranks they are this rank's slice, [s/t, b, h], and so is what norms and additions see.

Where documents are isolated, stages pass (hidden, positions): int64 [b, s] that restart at 0 with each document.
Attention then stops at the restarts. Masks are never built: causal is a flag of the attention kernel, and a
document is a slice of the sequence.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron import layout
from megatron.model.cache import CachedTokens
from megatron.model.documents import document_edges
from megatron.model.lora import add_adapters
from megatron.model.parallel import TensorParallel
from megatron.model.rotary import RotaryTable
from megatron.model.selective import Recomputed, product
from megatron.neox_arguments import NeoXArgs
from megatron.ops import add_rms_norm, apply_rotary, rms_norm, swiglu

Positions = Tensor | CachedTokens
Stream = Tensor | tuple[Tensor, Positions]
"""What layers pass: hidden states, or (hidden states, positions) where documents are isolated or tokens are cached."""


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale, in fp32, rounded once (Zhang and Sennrich 2019)."""

    def __init__(self, args: NeoXArgs, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = args.rms_norm_epsilon
        self.hf_rounding = args.hf_rounding
        self.scale = nn.Parameter(torch.empty(args.hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps, self.hf_rounding)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, its norm)."""
        return add_rms_norm(x, residual, self.scale, self.eps, self.hf_rounding)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (Ainslie et al. 2023)."""

    def __init__(self, args: NeoXArgs, tp: TensorParallel, rotary: RotaryTable) -> None:
        super().__init__()
        self.heads = args.num_attention_heads // tp.size
        self.kv_heads = args.num_kv_heads // tp.size
        self.head_dim = args.head_dim
        self.rotary = rotary
        qkv_features = (args.num_attention_heads + 2 * args.num_kv_heads) * self.head_dim
        self.query_key_value = tp.column(args.hidden_size, qkv_features)
        self.dense = tp.row(args.hidden_size, args.hidden_size)

    def forward(self, x: Tensor, positions: Positions | None) -> Tensor:
        return self.dense(self.core(self.query_key_value(x), positions))

    def core(self, qkv: Tensor, positions: Positions | None) -> Tensor:
        """What lies between the two products: the heads' contexts [s, b, n * d] of this rank's q, k and v."""
        q, k, v = layout.split_qkv(qkv, self.heads, self.kv_heads, self.head_dim)
        cos, sin = self.rotary.on(qkv.device)
        if isinstance(positions, CachedTokens):
            q, k = positions.rotate(q, k, cos, sin)
            return positions.attend(self, q, k, v).flatten(-2)
        q, k = apply_rotary(q, k, cos, sin, positions)  # [s, b, heads, d]
        context = causal_attention(q, k, v) if positions is None else document_attention(q, k, v, positions)
        return context.flatten(-2)


class MLP(nn.Module):
    """down(up(x) * silu(gate(x))) (Shazeer 2020)."""

    def __init__(self, args: NeoXArgs, tp: TensorParallel) -> None:
        super().__init__()
        self.linear1 = tp.column(args.hidden_size, 2 * args.intermediate_size)
        self.linear2 = tp.row(args.intermediate_size, args.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(swiglu(self.linear1(x)))


class TransformerLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h))."""

    def __init__(self, args: NeoXArgs, tp: TensorParallel, rotary: RotaryTable) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(args, tp.dtype)
        self.attention = Attention(args, tp, rotary)
        self.post_attention_layernorm = RMSNorm(args, tp.dtype)
        self.mlp = MLP(args, tp)
        self.selective = args.recompute == "selective"
        if args.lora is not None:
            add_adapters(self, args, tp)

    # DeepSpeed's recomputation spreads a tuple over the arguments, its plain forward passes the tuple.
    def forward(self, stream: Stream, positions: Positions | None = None) -> Stream:
        x, positions = stream if isinstance(stream, tuple) else (stream, positions)
        if self.selective and torch.is_grad_enabled():
            y = self.keeping_products(x, positions)
            return y if positions is None else (y, positions)
        attended = self.attention(self.input_layernorm(x), positions)
        h, normed = self.post_attention_layernorm.after_add(attended, x)
        y = h + self.mlp(normed)
        return y if positions is None else (y, positions)

    def keeping_products(self, x: Tensor, positions: Positions | None) -> Tensor:
        """The same, storing nothing but x, h and the outputs of the products that the backward pass needs."""
        attention, mlp = self.attention, self.mlp
        qkv = product(attention.query_key_value, Recomputed(self.input_layernorm, x))
        h = x + product(attention.dense, Recomputed(lambda heads: attention.core(heads, positions), qkv))
        up = product(mlp.linear1, Recomputed(self.post_attention_layernorm, h))
        return h + product(mlp.linear2, Recomputed(swiglu, up))


class Embedding(nn.Module):
    """ids [b, s] -> hidden [b, s, h]; a tied model reads its logits from the same matrix."""

    def __init__(self, args: NeoXArgs, tp: TensorParallel) -> None:
        super().__init__()
        self.word_embeddings = tp.embedding(args.padded_vocab_size, args.hidden_size)

    def forward(self, inputs: Stream) -> Stream:
        if isinstance(inputs, tuple):
            return self.word_embeddings(inputs[0]), inputs[1]
        return self.word_embeddings(inputs)


class FinalNorm(nn.Module):
    def __init__(self, args: NeoXArgs, tp: TensorParallel) -> None:
        super().__init__()
        self.norm = RMSNorm(args, tp.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Head(nn.Module):
    """hidden [b, s, h] -> this rank's logits [b, s, V / tp]."""

    def __init__(self, args: NeoXArgs, tp: TensorParallel) -> None:
        super().__init__()
        self.final_linear = tp.column(args.hidden_size, args.padded_vocab_size, sequence_dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_linear(x)


def sequence_first(stream: Stream) -> Stream:
    """[b, s, h] -> [s, b, h], the layout between decoder layers.

    What a frozen embedding gives asks for no gradient, and recomputation takes a layer with such an input as one that
    has nothing to learn: in training the decoder's input always asks for one.
    """
    hidden, positions = stream if isinstance(stream, tuple) else (stream, None)
    hidden = hidden.transpose(0, 1).contiguous()
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()
    return hidden if positions is None else (hidden, positions)


def batch_first(stream: Stream) -> Tensor:
    """[s, b, h] -> [b, s, h]; positions have done their work. Of cached tokens, those whose logits are wanted."""
    hidden, positions = stream if isinstance(stream, tuple) else (stream, None)
    if isinstance(positions, CachedTokens):
        return positions.at_outputs(hidden)
    return hidden.transpose(0, 1).contiguous()


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each position seeing itself and what is before it.

    q [s, b, n, d], k and v [s, b, m, d] with m dividing n; returns [s, b, n, d].
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return context.permute(2, 0, 1, 3)


def document_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """`causal_attention` within each document; a document starts where `positions` [b, s] is 0.

    Memory stays linear in s: each document is one call on a slice.
    """
    rows = []
    for row, edges in enumerate(document_edges(positions)):
        rows.append(
            torch.cat(
                [
                    causal_attention(*(x[start:stop, row : row + 1] for x in (q, k, v)))
                    for start, stop in itertools.pairwise(edges)
                ]
            )
        )
    return torch.cat(rows, dim=1)
