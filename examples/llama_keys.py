"""The GPT-NeoX keys that make a model a Llama, for examples, benchmarks and tests. Imports nothing."""

from __future__ import annotations

from typing import Any

LLAMA: dict[str, Any] = {
    "intermediate_size_convention": "hf",
    "norm": "rmsnorm",
    "pos_emb": "rotary",
    "activation": "swiglu",
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}
