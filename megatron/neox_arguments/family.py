"""Whether a configuration describes a dense Llama at all; checked first, on the keys as the user gave them.

GPT-NeoX builds GPTs, Pythias, mixtures of experts and more from the same keys, and its defaults (layernorm, learned
positions, gelu, biases) are not Llama's: a key that is left out matters as much as one that is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class OtherModel(NamedTuple):
    """Why a configuration is not that of a dense Llama: the message, and the keys that it mentions."""

    sentence: str
    keys: frozenset[str]


# Keys that make a model a Llama: Llama's value, and what GPT-NeoX takes when the key is left out.
DECIDING: dict[str, tuple[Any, Any]] = {
    "norm": ("rmsnorm", "layernorm"),
    "pos_emb": ("rotary", "learned"),
    "activation": ("swiglu", "gelu"),
    "use_bias_in_attn_linear": (False, True),
}
# Llama's values of keys that may be left out: Llama's value is then used, or a note elsewhere says what is assumed.
_SILENT: dict[str, tuple[Any, ...]] = {
    "use_bias_in_mlp": (False,),
    "gpt_j_residual": (False,),
    "rotary_pct": (1, 1.0),
    "use_qk_layernorm": (False,),
    "moe_num_experts": (0, 1),
    "sliding_window_width": (),
    "num_unique_layers": (),
    "sparsity_config": ({},),
}
_UNLIKE_GPT = ("use_qk_layernorm", "num_unique_layers", "sparsity_config", "sliding_window_width")
_TRAINING: dict[str, str] = {"train_impl": "normal", "dataset_impl": "gpt2"}
_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
_GPT = "GPT (GPT-NeoX's own kind, such as GPT-3, Pythia or GPT-NeoX-20B)"


def other_model(keys: Mapping[str, Any]) -> OtherModel | None:
    """Why the merged keys do not describe a dense Llama trained on next tokens; None if they do.

    Files without any key of a model (data, paths, a schedule) are left to the rules.
    """
    if not any(keys.get(name) is not None for name in (*_SIZES, *DECIDING)):
        return None
    missing = [name for name in DECIDING if keys.get(name) is None]
    found = dict(_contrary(keys))
    training = [f"{name}: {keys[name]}" for name, usual in _TRAINING.items() if keys.get(name) not in (None, usual)]
    if not missing and not found and not training:
        return None
    if not missing and not found:
        return OtherModel(
            f"this is preference or reinforcement training ({', '.join(training)}), and NeoX-Llama trains on next "
            f"tokens only (train_impl: normal); use GPT-NeoX for it",
            frozenset(_TRAINING) & set(keys),
        )
    reasons = [f"{name}: {_shown(value)}" for name, value in found.items()] + training
    if missing:
        named = ", ".join(f"{name} ({_shown(DECIDING[name][1])})" for name in missing)
        reasons.append(f"not given, so GPT-NeoX's default applies: {named}")
    cure = ", ".join(f"{name}: {_shown(DECIDING[name][0])}" for name in missing)
    return OtherModel(
        f"this is not a dense Llama but {_kind(keys, found)}: {'; '.join(reasons)}. NeoX-Llama trains dense Llama "
        f"models only; use GPT-NeoX for this one"
        + (f". If it is meant to be a Llama, write {cure}" if missing and not found else ""),
        frozenset([*missing, *found, *(name for name in _TRAINING if name in keys)]),
    )


def _contrary(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys that were given a value other than Llama's."""
    for name, (llama, _) in DECIDING.items():
        value = keys.get(name)
        old_name_of_swiglu = name == "activation" and value == "silu" and keys.get("mlp_type") == "llama"
        if value is not None and value != llama and not _same_word(value, llama) and not old_name_of_swiglu:
            yield name, value
    for name, neutral in _SILENT.items():
        value = keys.get(name)
        if value is not None and value not in neutral:
            yield name, value
    others = [kind for kind in attention_types(keys.get("attention_config")) if kind not in ("flash", "global")]
    if others:
        yield "attention_config", ", ".join(sorted(set(others)))


def attention_types(config: Any) -> list[str]:
    """Types named in `[[[flash, global], 80]]` or `[flash, global, ...]`."""
    names: list[str] = []
    for entry in config if isinstance(config, list) else []:
        types = entry[0] if isinstance(entry, list) and entry else entry
        names += map(str, types) if isinstance(types, list) else [str(types)]
    return names


def _kind(keys: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The common name of this kind of model."""
    types = set(attention_types(keys.get("attention_config")))
    for name, kind in (("mamba", "a Mamba model"), ("rwkv", "an RWKV model"), ("gmlp", "a gMLP"), ("amlp", "an aMLP")):
        if name in types:
            return kind
    if "moe_num_experts" in found:
        return "a mixture of experts"
    if set(found) == {"sliding_window_width"}:
        return "a model with a sliding window (Mistral)"
    if types - {"flash", "global"}:
        return "a GPT with sparse attention"
    return f"a {_GPT}" if set(found) - set(_UNLIKE_GPT) or not found else "another kind of transformer"


def _same_word(given: Any, wanted: Any) -> bool:
    return isinstance(given, str) and isinstance(wanted, str) and given.lower() == wanted


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
