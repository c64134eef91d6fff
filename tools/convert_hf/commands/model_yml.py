"""`model.yml`: the model part of a training configuration, derived from `config.json` so that nobody has to type it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..sources.llama_config import LlamaConfig


def model_keys(config: LlamaConfig, divisible_by: int) -> dict[str, Any]:
    """The NeoX keys that describe the model; keys whose value is None are omitted."""
    text = {
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": divisible_by,
        "no_weight_tying": not config.tied,
    }
    images = {"modality": "patches", "patches": config.patches}
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "intermediate_size_convention": "hf",
        "max_position_embeddings": config.max_position_embeddings,
        "pos_emb": "rotary",
        "rotary_pct": 1.0,
        "rotary_emb_base": _tidy(config.rotary_emb_base),
        "rope_scaling": config.rope_scaling,
        "norm": "rmsnorm",
        "rms_norm_epsilon": config.rms_norm_epsilon,
        "activation": "swiglu",
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        **(text if config.patches is None else images),
    }


def model_yml(keys: dict[str, Any], tokenizer: tuple[str, Path] | None) -> str:
    """The YAML text. `tokenizer` is its type and file, None if the source has no tokenizer."""
    if tokenizer:
        keys = keys | {"tokenizer_type": tokenizer[0], "vocab_file": str(tokenizer[1])}
    lines = ["# The model, as its config.json describes it. Use it with your run's own files:", "#"]
    lines += ["#   python deepy.py train.py model.yml run.yml", ""]
    for key, value in keys.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {k}: {_scalar(v)}" for k, v in value.items() if v is not None]
        elif value is not None:
            lines.append(f"{key}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _tidy(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 reads 1e-05 as a string: the mantissa needs a decimal point.
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value)
