"""FLOPs of training, by the two formulas in use. Whoever prints TFLOP/s names the formula.

At a sequence of 8,192 they agree for Llama-3.1-70B within 1.5 % by luck: GPT-NeoX's, without recomputation, misses
SwiGLU's and grouped-query attention's weights and counts attention's masked half. With recomputation they
differ by 35 %.
"""

from __future__ import annotations

from megatron.layout import LlamaShape


def megatron_flops_per_token(shape: LlamaShape, seq_length: int) -> float:
    """Forward and backward FLOPs per token as Megatron-LM counts them: matrix weights 6 times, causal attention
    halved, no recomputation (a model number, for MFU)."""
    h, layers, vocab = shape.hidden_size, shape.num_layers, shape.padded_vocab_size
    kv = shape.num_kv_heads * shape.head_dim
    layer = h * (h + 2 * kv) + h * h + 3 * h * shape.intermediate_size
    return 6.0 * (layers * layer + h * vocab) + 6.0 * layers * seq_length * h


def neox_flops_per_token(shape: LlamaShape, seq_length: int, recomputed: float) -> float:
    """FLOPs per token as GPT-NeoX's log counts them (Narayanan et al. 2021): multi-head attention and a 4h MLP
    assumed, full-square attention, and one more forward of the share `recomputed` of the layers, 0 to 1 (a hardware
    number, for HFU; GPT-NeoX itself knows all or none)."""
    h, layers = shape.hidden_size, shape.num_layers
    passes = 3 + recomputed
    return 24.0 * passes * layers * h * h * (1 + seq_length / (6 * h) + shape.padded_vocab_size / (16 * layers * h))
