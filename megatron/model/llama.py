"""The Llama decoder, top to bottom (Touvron et al. 2023; Llama-3.1: grouped-query attention, scaled rotary).

Shapes: s sequence, b micro-batch, h hidden, V padded vocabulary; a tensor-parallel rank holds n query heads and m key
and value heads, each of d dimensions. Between layers the hidden states are [s, b, h]. With sequence parallelism over t
ranks they are this rank's slice, [s/t, b, h], on which norms and residual additions work as well.

With isolated documents, stages pass (hidden, positions), int64 [b, s] that restart at 0 with each document. Within a
stage, layers pass (hidden, documents): the positions, and the document boundaries that the host has read from them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron import layout
from megatron.model.attention import causal_attention, document_attention
from megatron.model.cache import CachedTokens
from megatron.model.documents import Documents
from megatron.model.lora import add_adapters
from megatron.model.parallel import TensorParallel
from megatron.model.rotary import RotaryTable
from megatron.model.selective import Recomputed, product
from megatron.neox_arguments import NeoXArgs
from megatron.ops import add_rms_norm, apply_rotary, rms_norm, swiglu

Beside = Documents | CachedTokens
Stream = Tensor | tuple[Tensor, Beside]
"""What layers pass on: hidden states, alone or paired with isolated documents or cached tokens."""


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
        """(x + residual, norm of the sum)."""
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

    def forward(self, x: Tensor, beside: Beside | None) -> Tensor:
        return self.dense(self.core(self.query_key_value(x), beside))

    def core(self, qkv: Tensor, beside: Beside | None) -> Tensor:
        """Everything between the two matrix products: this rank's packed q, k, v -> the heads' contexts [s, b, n d]."""
        q, k, v = layout.split_qkv(qkv, self.heads, self.kv_heads, self.head_dim)
        cos, sin = self.rotary.on(qkv.device)
        if isinstance(beside, CachedTokens):
            q, k = beside.rotate(q, k, cos, sin)
            return beside.attend(self, q, k, v).flatten(-2)
        q, k = apply_rotary(q, k, cos, sin, None if beside is None else beside.positions)  # [s, b, heads, d]
        context = causal_attention(q, k, v) if beside is None else document_attention(q, k, v, beside)
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

    # DeepSpeed unpacks the tuple into arguments when it recomputes, and passes it whole otherwise.
    def forward(self, stream: Stream, beside: Beside | None = None) -> Stream:
        x, beside = stream if isinstance(stream, tuple) else (stream, beside)
        if self.selective and torch.is_grad_enabled():
            y = self.keeping_products(x, beside)
            return y if beside is None else (y, beside)
        attended = self.attention(self.input_layernorm(x), beside)
        h, normed = self.post_attention_layernorm.after_add(attended, x)
        y = h + self.mlp(normed)
        return y if beside is None else (y, beside)

    def keeping_products(self, x: Tensor, beside: Beside | None) -> Tensor:
        """The layer's output, storing only x, h and the matrix products' outputs that the backward pass needs."""
        attention, mlp = self.attention, self.mlp
        qkv = product(attention.query_key_value, Recomputed(self.input_layernorm, x))
        h = x + product(attention.dense, Recomputed(lambda heads: attention.core(heads, beside), qkv))
        up = product(mlp.linear1, Recomputed(self.post_attention_layernorm, h))
        return h + product(mlp.linear2, Recomputed(swiglu, up))


class Embedding(nn.Module):
    """ids [b, s] -> hidden [b, s, h]; a tied model computes its logits with the same matrix."""

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

    In training the decoder's input always requires a gradient. A frozen embedding's output does not, and recomputation
    would then treat the layers that follow as if they had nothing to learn.
    """
    hidden, beside = stream if isinstance(stream, tuple) else (stream, None)
    hidden = hidden.transpose(0, 1).contiguous()
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()
    return hidden if beside is None else (hidden, beside)


def batch_first(stream: Stream) -> Tensor:
    """[s, b, h] -> [b, s, h], dropping the documents; with cached tokens, only the n at their outputs, [n, 1, h]."""
    hidden, beside = stream if isinstance(stream, tuple) else (stream, None)
    if isinstance(beside, CachedTokens):
        return beside.at_outputs(hidden)
    return hidden.transpose(0, 1).contiguous()
