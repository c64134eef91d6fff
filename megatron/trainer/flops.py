"""Model FLOPs of training, by the two formulas in use. A log that prints TFLOP/s names the formula."""

from __future__ import annotations

from megatron.neox_arguments import NeoXArgs


def megatron_flops_per_token(args: NeoXArgs) -> float:
    """Forward and backward FLOPs per token as Megatron-LM counts them: matrix weights 6 times, causal attention
    halved, no recomputation (a model number, for MFU)."""
    h, q = args.hidden_size, args.hidden_size
    kv = args.num_kv_heads * args.head_dim
    layer = h * (q + 2 * kv) + q * h + 3 * h * args.intermediate_size
    return 6.0 * (args.num_layers * layer + h * args.padded_vocab_size) + 6.0 * args.num_layers * args.seq_length * q


def neox_flops_per_token(args: NeoXArgs) -> float:
    """FLOPs per token as GPT-NeoX's log counts them: multi-head attention and a 4h MLP assumed, full-square
    attention, and one more forward where activations are recomputed (a hardware number, for HFU)."""
    h, s, layers = args.hidden_size, args.seq_length, args.num_layers
    passes = 4 if args.checkpoint_activations else 3
    return 24.0 * passes * layers * h * h * (1 + s / (6 * h) + args.padded_vocab_size / (16 * layers * h))
