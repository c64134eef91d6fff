"""Bytes of one micro-batch on one rank: what a decoder layer stores, and what its backward pass needs in addition.

Follows the modules of `megatron.model.llama` tensor by tensor. h = hidden_size, f = intermediate_size, kv = key/value
heads x head_dim, t = tensor-parallel ranks. Elements per token that autograd keeps of a layer:

    2h               outputs of the two norms, inputs of the column-parallel matrices
    h                the residual sum between attention and MLP
    (h + 2kv) / t    the fused projection: v is a view of it
    (h + kv) / t     rotated q and k
    h / t            attention's output
    3f / t           up and gate, and their product

and h for the layer's input, which is all that full recomputation keeps. Selective recomputation keeps the input, the
residual sum and the outputs of the two fused projections: it recomputes norms, attention and SwiGLU, but no matrix
product. Sequence parallelism divides the terms without t by t as well: a column-parallel matrix keeps its slice of the
input and gathers it again.

With LoRA, a frozen matrix does not keep its input; its A does, if it has one. For each fused matrix with n adapted
projections of rank r, n r elements per token are kept between A and B, and a copy of the A's, which are applied as one.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from megatron.common.cpu_cache import BLOCK_ELEMENTS
from megatron.layout import FACTOR_A, LlamaShape, PatchShape, rank_shape, trained_rows
from megatron.planner.cost.compute import FP32
from megatron.planner.cost.parallel_layout import ParallelLayout, Recompute

INT64 = 8

Ops = Literal["kernels", "torch", "cpu"]
"""How the fused operations run: as compiled kernels, which need no temporaries; as PyTorch references on a GPU, with
fp32 temporaries as large as their input; or the references on a CPU, in blocks of rows (`megatron.ops.cpu_blocks`)."""


@dataclass(frozen=True)
class PatchEnds:
    """Bytes at the two ends of an image model, for one micro-batch and tensor-parallel rank; patches are uint8.

    With P values per patch and a tokenizer MLP of width E = 4h / t, the embedding keeps its scaled input (P) and, if it
    is an MLP, GELU's input and output (2E). The head keeps 2E, its prediction (P) and the loss's operands in fp32.
    """

    embedding: int  # kept until the embedding's backward pass
    embedding_backward: int
    head: int  # kept until the loss is differentiated
    prediction: int  # kept by DeepSpeed's engine
    loss: int  # temporaries in addition
    targets: int

    @classmethod
    def of(cls, shape: PatchShape, layout: ParallelLayout, tokens: int, element: int) -> PatchEnds:
        slices = layout.tensor if layout.sequence_parallel else 1
        values = tokens * shape.patch_values
        inner = 0 if shape.tokenizer == "affine" else tokens * shape.patch_hidden_size // layout.tensor * element
        own = values // slices  # of the part of the sequence whose loss this rank computes
        upcast = element < FP32
        return cls(
            embedding=values * element + 2 * inner,
            embedding_backward=2 * inner,
            head=2 * inner + own * FP32 * (2 if upcast else 1),
            prediction=own * element,
            loss=own * (2 * FP32 + (element if upcast else 0)),
            targets=values,
        )


@dataclass(frozen=True)
class Activations:
    """Bytes of each tensor of one micro-batch, for one tensor-parallel rank."""

    hidden: int  # residual stream [s, b, h]; a slice of it under sequence parallelism
    gathered: int  # [s, b, h] whole
    qkv: int
    rotated: int
    context: int
    log_sum_exp: int  # fp32, one per token and head
    up_gate: int
    product: int
    inverse_rms: int  # fp32, one per token
    logits: int
    tokens: int  # ids, int64
    swiglu_temporaries: int
    norm_temporaries: int
    loss_temporaries: int
    sliced: bool  # sequence parallelism
    several: bool  # more than one sequence per micro-batch: [s, b, h] <-> [b, s, h] then needs copies
    documents: bool
    on_host: bool  # a CPU's memory
    frozen: bool  # an adapter is trained on frozen weights
    adapters: int  # kept by a layer's adapters
    unread: int  # inputs that are not kept, because their matrix is frozen and has no adapter
    joined: int  # outputs of the up and gate adapters, concatenated to be added
    ends: PatchEnds | None = None  # for an image model

    @classmethod
    def of(
        cls, shape: LlamaShape, layout: ParallelLayout, seq_length: int, element: int, ops: Ops, documents: bool
    ) -> Activations:
        tokens, t = seq_length * layout.micro_batch, layout.tensor
        h, f, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
        vocabulary = shape.padded_vocab_size // t
        share = t if layout.sequence_parallel else 1
        factors = _factors_by_matrix(shape, t)

        def block(width: int) -> int:
            """Elements that a reference processes at once."""
            if ops == "kernels" or not width:
                return 0
            return tokens * width if ops == "torch" else min(tokens, max(1, BLOCK_ELEMENTS // width)) * width

        upcast = element < FP32  # fp32 inputs are worked on in place
        return cls(
            hidden=tokens * h * element // share,
            gathered=tokens * h * element,
            qkv=tokens * (h + 2 * kv) // t * element,
            rotated=tokens * (h + kv) // t * element,
            context=tokens * h // t * element,
            log_sum_exp=tokens * shape.num_attention_heads // t * FP32,
            up_gate=tokens * 2 * f // t * element,
            product=tokens * f // t * element,
            inverse_rms=tokens * FP32 // share,
            logits=tokens * vocabulary * element,
            tokens=tokens * (shape.patch_values if isinstance(shape, PatchShape) else INT64),
            # fp32 copies of up, gate, dout, of both gradients, and one product; or the product alone
            swiglu_temporaries=block(f // t) * FP32 * (6 if upcast else 1),
            norm_temporaries=block(h) * FP32 * (3 if upcast else 0),
            # the softmax, and an fp32 copy of its input
            loss_temporaries=block(vocabulary) * FP32 * (2 if upcast else 1),
            sliced=layout.sequence_parallel and t > 1,
            several=layout.micro_batch > 1,
            documents=documents,
            on_host=ops == "cpu",
            frozen=shape.frozen_base,
            adapters=_kept_by_adapters(factors, layout, tokens) * element,
            unread=_unread(factors, shape, layout, tokens) * element,
            joined=tokens * 2 * f // t * element * ("mlp.linear1" in factors),
            ends=PatchEnds.of(shape, layout, tokens, element) if isinstance(shape, PatchShape) else None,
        )

    @property
    def inside_layer(self) -> int:
        """What autograd keeps of a decoder layer besides its input."""
        norms = 3 * self.hidden + 2 * self.inverse_rms
        attention = self.qkv + self.rotated + self.context + self.log_sum_exp
        if self.documents:  # one output per document, concatenated
            attention += self.context
        return norms + attention + self.up_gate + self.product + self.adapters - self.unread

    def stored_by_layer(self, recompute: Recompute) -> int:
        """What a decoder layer keeps until its backward pass, its input included."""
        if recompute == "full":
            return self.hidden
        if recompute == "selective":
            return 2 * self.hidden + self.qkv + self.up_gate + self.adapters
        return self.hidden + self.inside_layer

    @property
    def layer_forward(self) -> int:
        """Peak bytes beyond what is stored when the last layer of a frozen base adds the outputs of its up and gate
        adapters: each of them and their concatenation, next to attention's output. Otherwise a backward pass needs
        more."""
        return 2 * self.joined + self.hidden - self.product if self.joined else 0

    @property
    def column_backward(self) -> int:
        """Bytes that a column-parallel matrix needs for its input gradient: the gradient itself and, with sequence
        parallelism, the gathered input and its gradient, of which gloo scatters a copy."""
        if not self.sliced:
            return self.gathered
        return self.hidden + self.gathered * (3 if self.on_host else 2)

    def layer_backward(self, recompute: Recompute, first_matrix: int, second_matrix: int, incoming: int) -> int:
        """Peak bytes beyond what is stored during the backward pass of one layer.

        `first_matrix` and `second_matrix` are the bytes of the MLP's weight gradients, `incoming` those of the
        gradient of the layer's output and its copies.
        """
        # Selective recomputation holds one product's input at a time, next to what it is computed from.
        selective = max(2 * self.product, self.rotated + 2 * self.context + self.log_sum_exp)
        again = {"none": 0, "selective": selective, "full": self.inside_layer + self.hidden}[recompute]
        # Sequence parallelism: the gathered gradient of a row-parallel matrix's output.
        of_row = self.gathered if self.sliced else 0
        # An adapter's input gradient is added to that of its frozen matrix: both exist at once.
        twice = 2 if self.frozen else 1
        moments = (
            of_row + twice * self.product + second_matrix,  # gradient of the product, and of the MLP's second matrix
            self.up_gate + self.swiglu_temporaries,  # the product is freed; its gradient and those of up and gate live
            self.column_backward + self.hidden * (twice - 1) + first_matrix - self.product,
            self.hidden + self.norm_temporaries - self.product - self.up_gate,
        )
        return again + incoming + max(moments)


def _factors_by_matrix(shape: LlamaShape, tensor: int) -> dict[str, tuple[int, int]]:
    """For each fused matrix with adapters: (sum of their ranks, elements of their A's)."""
    found: dict[str, tuple[int, int]] = {}
    for row in trained_rows(shape) if shape.frozen_base else ():
        fused, _, factor, _ = row.neox.rsplit(".", 3)
        if factor == FACTOR_A:
            ranks, elements = found.get(fused, (0, 0))
            local = rank_shape(row, shape, tensor)
            found[fused] = (ranks + local[0], elements + local[0] * local[1])
    return found


def _kept_by_adapters(factors: dict[str, tuple[int, int]], layout: ParallelLayout, tokens: int) -> int:
    """Elements that a layer's adapters keep: the activations between A and B, and the concatenated A's.

    With sequence parallelism the activations of row-parallel matrices are slices of the sequence.
    """
    total = 0
    for fused, (ranks, elements) in factors.items():
        sliced = layout.sequence_parallel and fused in ("attention.dense", "mlp.linear2")
        total += tokens // (layout.tensor if sliced else 1) * ranks + elements
    return total


def _unread(adapted: Container[str], shape: LlamaShape, layout: ParallelLayout, tokens: int) -> int:
    """Elements of inputs that are not kept because their matrix is frozen and has no adapter.

    With sequence parallelism column-parallel matrices keep their slices anyway; attention keeps its own output.
    """
    if not shape.frozen_base:
        return 0
    unread = 0
    if not layout.sequence_parallel:
        unread += shape.hidden_size * (("attention.query_key_value" not in adapted) + ("mlp.linear1" not in adapted))
    return tokens * (unread + shape.intermediate_size // layout.tensor * ("mlp.linear2" not in adapted))
