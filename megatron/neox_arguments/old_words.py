"""Keys of older GPT-NeoX versions and of Hugging Face configs, each with the current key and value to write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Keys = Mapping[str, Any]


def _renamed(name: str) -> Callable[[Any, Keys], str]:
    return lambda value, keys: f"write {name}: {value}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _warmup_iters(value: Any, keys: Keys) -> str:
    """The current key, warmup, is a fraction of the length of the decay."""
    given, length = _number(value), _number(keys.get("lr_decay_iters") or keys.get("train_iters"))
    if given is None or not length:
        return "write warmup: a fraction of lr_decay_iters, not a number of iterations"
    return f"write warmup: {given / length:.6g} ({value} of {length:g} iterations)"


def _decay_lr_to(value: Any, keys: Keys) -> str:
    """decay_lr_to was a fraction of the peak."""
    optimizer = keys.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    peak, share = _number(params.get("lr") if isinstance(params, dict) else None), _number(value)
    if peak is None or share is None:
        return "write min_lr: the floor itself, not a fraction of the peak"
    return f"write min_lr: {peak * share:.6g} ({value} of the peak {peak:g})"


def _mlp_type(value: Any, keys: Keys) -> str:
    """The old Llama MLP used intermediate_size as given, else 8/3 hidden_size rounded up to a multiple of 256."""
    if value != "llama":
        return "leave it out: activation selects the MLP, and Llama's is swiglu"
    hidden, given, multiple = keys.get("hidden_size"), keys.get("intermediate_size"), keys.get("mlp_multiple_of")
    if isinstance(given, int):
        return f"write activation: swiglu, and intermediate_size: {3 * given} (3 x the width, which was {given})"
    if not isinstance(hidden, int):
        return "write activation: swiglu"
    step = multiple if isinstance(multiple, int) and multiple > 1 else 256
    width = step * -(-(8 * hidden // 3) // step)
    return (
        f"write activation: swiglu, and intermediate_size: {3 * width} (3 x {width}, the width that the old MLP took "
        f"for hidden_size {hidden})"
    )


def _tied(value: Any, keys: Keys) -> str:
    return f"write no_weight_tying: {str(not value).lower()}"


# What to write instead, from the given value and all keys. Where no value can be computed, the message states its unit.
OLD_WORDS: dict[str, Callable[[Any, Keys], str]] = {
    "gas": _renamed("gradient_accumulation_steps"),
    "mlp_type": _mlp_type,
    "warmup_iters": _warmup_iters,
    "decay_lr_to": _decay_lr_to,
    "save_interval": _renamed("checkpoint_factor"),
    "attention_type": lambda value, keys: "leave it out: num_kv_heads says how many query heads share a key/value head",
    "layernorm_eps": _renamed("rms_norm_epsilon"),
    "rms_norm_eps": _renamed("rms_norm_epsilon"),
    "rope_theta": _renamed("rotary_emb_base"),
    "num_key_value_heads": _renamed("num_kv_heads"),
    "num_hidden_layers": _renamed("num_layers"),
    "tie_word_embeddings": _tied,
}


def old_word(name: str, value: Any, keys: Keys) -> str | None:
    """The message for an old key; None if `name` is not one."""
    answer = OLD_WORDS.get(name)
    return None if answer is None else f"{name} is not a key of current GPT-NeoX; {answer(value, keys)}"


def silu_was_swiglu(keys: Keys) -> str | None:
    """The message for `activation: silu` with the old `mlp_type: llama`, which meant swiglu; None otherwise."""
    if keys.get("activation") == "silu" and keys.get("mlp_type") == "llama":
        return "activation: silu meant the gated MLP together with mlp_type: llama; write activation: swiglu"
    return None
