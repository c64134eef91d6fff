"""FLOPs of training, by the two formulas in use. Any output in TFLOP/s must name its formula.

For Llama-3.1-70B at a sequence length of 8,192 they happen to agree within 1.5 %: without recomputation, GPT-NeoX's
ignores the weight shapes of SwiGLU and grouped-query attention, and counts the masked half of attention. With
recomputation they differ by 35 %.

With an adapter (LoRA) the base is frozen: no weight gradients are computed, and its weights count 4 times instead of 6.
"""

from __future__ import annotations

from math import prod

from megatron.layout import LlamaShape, PatchShape, rank_shape, trained_rows


def megatron_flops_per_token(shape: LlamaShape, seq_length: int) -> float:
    """Forward and backward FLOPs per token as Megatron-LM counts them: matrix weights 6 times, causal attention
    halved, no recomputation (model FLOPs, for MFU). With an adapter the base's weights count 4 times, the adapter's
    6 times."""
    h, layers, vocab = shape.hidden_size, shape.num_layers, shape.padded_vocab_size
    kv = shape.num_kv_heads * shape.head_dim
    layer = h * (h + 2 * kv) + h * h + 3 * h * shape.intermediate_size
    weights = layers * layer + (shape.patch_end_weights if isinstance(shape, PatchShape) else h * vocab)
    matrices = 6.0 * weights
    if shape.frozen_base:
        factors = sum(prod(rank_shape(row, shape, tp=1)) for row in trained_rows(shape))
        matrices = 4.0 * weights + 6.0 * layers * factors
    return matrices + 6.0 * layers * seq_length * h


def neox_flops_per_token(shape: LlamaShape, seq_length: int, recomputed: float) -> float:
    """FLOPs per token as GPT-NeoX's log counts them (Narayanan et al. 2021): multi-head attention and a 4h MLP
    assumed, full-square attention, and a second forward pass of the fraction `recomputed` of the layers, 0 to 1
    (hardware FLOPs, for HFU; GPT-NeoX itself knows all or none). With an adapter there is one pass less."""
    h, layers = shape.hidden_size, shape.num_layers
    passes = 3 + recomputed - shape.frozen_base
    return 24.0 * passes * layers * h * h * (1 + seq_length / (6 * h) + shape.padded_vocab_size / (16 * layers * h))
