"""Fused operations of the Llama decoder: one file per operation, each with its PyTorch reference."""

from megatron.ops.choose import configure
from megatron.ops.cross_entropy import vocab_parallel_cross_entropy
from megatron.ops.rms_norm import add_rms_norm, rms_norm
from megatron.ops.rotary import apply_rotary
from megatron.ops.swiglu import swiglu

__all__ = ["add_rms_norm", "apply_rotary", "configure", "rms_norm", "swiglu", "vocab_parallel_cross_entropy"]
