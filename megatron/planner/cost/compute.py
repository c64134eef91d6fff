"""Cost of one decoder layer and of the two ends of the model on one rank: FLOPs, memory traffic and time.

Formulas follow the modules in `megatron/model/llama.py`: s sequence, b micro-batch, h hidden, f the MLP's width, t
tensor-parallel ranks; 2-byte activations. Times are those of one micro-batch on one GCD.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron.layout import LlamaShape, PatchShape, rank_shape, trained_rows
from megatron.planner.cost.machines import Machine
from megatron.planner.cost.parallel_layout import ParallelLayout

BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Seconds:
    """Time by what it is spent on."""

    gemm: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.memory_bound

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.gemm + other.gemm, self.attention + other.attention, self.memory_bound + other.memory_bound)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.gemm * factor, self.attention * factor, self.memory_bound * factor)


def gemm_seconds(m: int, k: int, n: int, machine: Machine) -> float:
    """Time of [m, k] x [k, n]: arithmetic at the kernels' rate, plus the memory traffic of operands and result."""
    arithmetic = 2.0 * m * k * n / machine.gemm_flops
    traffic = BF16 * (m * k + k * n + m * n) / machine.hbm_rate
    return (arithmetic + traffic) / machine.sustained


def linear_seconds(tokens: int, features_in: int, features_out: int, machine: Machine) -> tuple[float, float]:
    """(forward, backward) of one matrix; backward is the gradient of the input and that of the weight."""
    forward = gemm_seconds(tokens, features_in, features_out, machine)
    of_input = gemm_seconds(tokens, features_out, features_in, machine)
    of_weight = gemm_seconds(features_in, tokens, features_out, machine)
    return forward, of_input + of_weight


def frozen_linear_seconds(tokens: int, features_in: int, features_out: int, machine: Machine) -> tuple[float, float]:
    """(forward, backward) of one frozen matrix, which has no weight gradient."""
    forward = gemm_seconds(tokens, features_in, features_out, machine)
    return forward, gemm_seconds(tokens, features_out, features_in, machine)


def adapter_seconds(shape: LlamaShape, tensor: int, tokens: int, machine: Machine) -> tuple[float, float]:
    """(forward, backward) of the factors of a decoder layer's adapters on one rank."""
    forward = backward = 0.0
    for row in trained_rows(shape):
        features_out, features_in = rank_shape(row, shape, tensor)
        there, back = linear_seconds(tokens, features_in, features_out, machine)
        forward, backward = forward + there, backward + back
    return forward, backward


@dataclass(frozen=True)
class TrainedElements:
    """Trained parameters of one tensor-parallel rank: of a decoder layer, an embedding or head, the last norm."""

    layer: int
    vocabulary: int
    final_norm: int

    @classmethod
    def of(cls, shape: LlamaShape, tensor: int) -> TrainedElements:
        if shape.frozen_base:
            return cls(sum(prod(rank_shape(row, shape, tensor)) for row in trained_rows(shape)), 0, 0)
        layer = sum(i * o for i, o in layer_matrices(shape, tensor)) + 2 * shape.hidden_size
        if isinstance(shape, PatchShape):
            return cls(layer, sum(i * o for i, o in patch_matrices(shape, tensor)), shape.hidden_size)
        return cls(layer, shape.padded_vocab_size * shape.hidden_size // tensor, shape.hidden_size)


def layer_matrices(shape: LlamaShape, tensor: int) -> list[tuple[int, int]]:
    """(in, out) features of a rank's four matrices of a decoder layer."""
    h, f, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
    return [(h, (h + 2 * kv) // tensor), (h // tensor, h), (h, 2 * f // tensor), (f // tensor, h)]


def patch_matrices(shape: PatchShape, tensor: int) -> list[tuple[int, int]]:
    """(in, out) features of a rank's matrices in the head of an image model; the embedding's are transposed."""
    h, values = shape.hidden_size, shape.patch_values
    if shape.tokenizer == "affine":
        return [(h, values)]
    return [(h, shape.patch_hidden_size // tensor), (shape.patch_hidden_size // tensor, values)]


def attention_flops(shape: LlamaShape, layout: ParallelLayout, seq_length: int) -> float:
    """Forward FLOPs of causal attention in one layer, micro-batch and rank: two products, the masked half skipped."""
    return 2.0 * layout.micro_batch * seq_length * seq_length * shape.hidden_size / layout.tensor


def layer_seconds(
    shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine
) -> tuple[Seconds, Seconds, Seconds]:
    """(forward, backward, recomputation) of one decoder layer and micro-batch, without communication."""
    tokens = layout.micro_batch * seq_length
    gemm_forward = gemm_backward = 0.0
    of_matrix = linear_seconds
    if shape.frozen_base:
        of_matrix = frozen_linear_seconds
        gemm_forward, gemm_backward = adapter_seconds(shape, layout.tensor, tokens, machine)
    for features_in, features_out in layer_matrices(shape, layout.tensor):
        there, back = of_matrix(tokens, features_in, features_out, machine)
        gemm_forward += there
        gemm_backward += back
    flops = attention_flops(shape, layout, seq_length)
    attention_forward = flops / machine.attention_forward_flops / machine.sustained
    # five products against the forward's two (Dao 2023: scores again, and four gradients)
    attention_backward = 2.5 * flops / machine.attention_backward_flops / machine.sustained
    there, back = (
        bytes_ / machine.hbm_rate / machine.sustained for bytes_ in memory_bound_bytes(shape, layout, tokens)
    )
    forward = Seconds(gemm_forward, attention_forward, there)
    recompute = {
        "none": Seconds(),
        "selective": Seconds(attention=attention_forward, memory_bound=there),
        "full": forward,
    }[layout.recompute]
    return forward, Seconds(gemm_backward, attention_backward, back), recompute


def memory_bound_bytes(shape: LlamaShape, layout: ParallelLayout, tokens: int) -> tuple[float, float]:
    """(forward, backward) bytes moved by the memory-bound operations of a layer.

    Counts the fused operations of `megatron/ops`: norm (read x, write y), residual addition fused with the other norm,
    the second addition, rotary embedding of q and k, SwiGLU. Sequence parallelism divides those outside the
    tensor-parallel region.
    """
    h, f, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
    outside = layout.tensor if layout.sequence_parallel else 1
    rotary = 2 * (h + kv) / layout.tensor
    forward = (2 + 4 + 3) * h / outside + rotary + 3 * f / layout.tensor
    # each norm: x, dy, dx and the residual's gradient, which is added; SwiGLU: gate, up and dy in, two gradients out
    backward = (4 + 4) * h / outside + rotary + 5 * f / layout.tensor
    return BF16 * tokens * forward, BF16 * tokens * backward


def head_seconds(shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine) -> Seconds:
    """Final norm, output head and loss of one micro-batch, forward and backward; never recomputed."""
    tokens = layout.micro_batch * seq_length
    if isinstance(shape, PatchShape):
        return _patch_seconds(shape, layout, tokens, machine)
    columns = shape.padded_vocab_size // layout.tensor
    of_matrix = frozen_linear_seconds if shape.frozen_base else linear_seconds
    gemm = sum(of_matrix(tokens, shape.hidden_size, columns, machine))
    logits = 3 * columns  # read for the loss; read, and their gradient written, in the backward
    outside = layout.tensor if layout.sequence_parallel else 1
    moved = BF16 * tokens * (logits + 5 * shape.hidden_size / outside)
    return Seconds(gemm=gemm, memory_bound=moved / machine.hbm_rate / machine.sustained)


def embedding_seconds(shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine) -> Seconds:
    """Embedding of one micro-batch: gathers rows, and in the backward pass adds them into a whole matrix's gradient."""
    tokens = layout.micro_batch * seq_length
    if isinstance(shape, PatchShape):
        return _patch_seconds(shape, layout, tokens, machine)
    rows = shape.padded_vocab_size // layout.tensor
    moved = BF16 * shape.hidden_size * (4 * tokens + 2 * rows)
    return Seconds(memory_bound=moved / machine.hbm_rate / machine.sustained)


def _patch_seconds(shape: PatchShape, layout: ParallelLayout, tokens: int, machine: Machine) -> Seconds:
    """One end of an image model, forward and backward: its matrix products, and the fp32 traffic of scaling, loss and
    GELU, about twelve times the values of a patch."""
    gemm = sum(sum(linear_seconds(tokens, i, o, machine)) for i, o in patch_matrices(shape, layout.tensor))
    moved = FP32 * 12.0 * tokens * shape.patch_values
    return Seconds(gemm=gemm, memory_bound=moved / machine.hbm_rate / machine.sustained)
