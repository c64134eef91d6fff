"""Epsilon and rotary settings, which tensors do not reveal, and whether training and config.json agree on them.

For a Hugging Face folder they are in config.json. For GPT-NeoX they come from the training configuration: the manifest
of a training checkpoint, the model.yml that a conversion wrote, or the `configs/` that GPT-NeoX keeps with its weights;
only if none of these exists, from the config.json in the side folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConvertError
from .llama_config import LlamaConfig

_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Settings:
    """Hyperparameters and the file they were read from; None for those that the file does not give."""

    origin: str
    rms_norm_epsilon: float | None
    rotary_emb_base: float | None
    rope_scaling: dict[str, float] | None  # None: no scaling

    def differences(self, other: Settings) -> list[tuple[str, Any, Any]]:
        """(key, own value, other's value) for every setting that both give and that differs."""
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in ("rms_norm_epsilon", "rotary_emb_base")]
        found = [(n, a, b) for n, a, b in pairs if a is not None and b is not None and a != b]
        if self.rope_scaling != other.rope_scaling:
            found.append(("rope_scaling", self.rope_scaling, other.rope_scaling))
        return found


def settings_of_config(config: LlamaConfig, origin: str) -> Settings:
    """The settings in a config.json."""
    scaling = _scaling(config.rope_scaling, "config.json")
    return Settings(origin, config.rms_norm_epsilon, config.rotary_emb_base, scaling)


def settings_of_keys(keys: Any, origin: str) -> Settings:
    """The settings in GPT-NeoX keys."""
    if not isinstance(keys, Mapping):
        raise ConvertError(f"{origin} does not record the configuration")
    epsilon = _number(keys.get("rms_norm_epsilon"), f"{origin}: rms_norm_epsilon")
    base = _number(keys.get("rotary_emb_base"), f"{origin}: rotary_emb_base")
    return Settings(origin, epsilon, base, _scaling(keys.get("rope_scaling"), origin))


def settings_of_files(paths: list[Path]) -> Settings | None:
    """The settings in several GPT-NeoX YAML files, later ones taking precedence; None if they describe no model."""
    keys: dict[str, Any] = {}
    for path in paths:
        keys |= _read_yaml(path)
    if "num_layers" not in keys:
        return None
    return settings_of_keys(keys, str(paths[0] if len(paths) == 1 else paths[0].parent))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path} must hold a mapping")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def _number(value: Any, where: str) -> float | None:
    try:
        return None if value is None else float(value)  # YAML 1.1 reads 1e-5 as text
    except (TypeError, ValueError):
        raise ConvertError(f"{where} must be a number, not {value!r}") from None


def _scaling(value: Any, where: str) -> dict[str, float] | None:
    if value is None:
        return None
    kind = value.get("rope_type", value.get("type")) if isinstance(value, Mapping) else None
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConvertError(f"{where}: rope_scaling has type {kind!r}; known are 'llama3' and 'default'")
    numbers = {key: _number(value.get(key), f"{where}: rope_scaling.{key}") for key in _ROPE}
    return {key: number for key, number in numbers.items() if number is not None}


def refuse_differences(trained: Settings | None, written: Settings | None) -> None:
    """Stop an export whose config.json (`written`) would not describe the model that was trained."""
    if trained is None or written is None:
        return
    for key, ours, theirs in trained.differences(written):
        raise ConvertError(
            f"{key} is {json.dumps(ours)} in {trained.origin}, but {json.dumps(theirs)} in {written.origin}: the "
            f"exported model would not be the trained one. Correct whichever is wrong, or add --trained-settings "
            f"to write the values used in training into the exported config.json"
        )


def with_trained_settings(raw: dict[str, Any], trained: Settings | None, written: Settings | None) -> dict[str, Any]:
    """`raw` (config.json, with the settings `written`) with the settings of the training run, in `raw`'s spelling."""
    if trained is None or written is None:
        return raw
    changed = {key: ours for key, ours, _ in trained.differences(written)}
    result = dict(raw)
    if "rms_norm_epsilon" in changed:
        result["rms_norm_eps"] = changed["rms_norm_epsilon"]
    rope = {k: v for k, v in changed.items() if k != "rms_norm_epsilon"}
    if not rope:
        return result
    scaling = {"rope_type": "llama3", **trained.rope_scaling} if trained.rope_scaling else None
    if "rope_parameters" in result:
        result["rope_parameters"] = {"rope_theta": trained.rotary_emb_base, **(scaling or {"rope_type": "default"})}
    if "rope_theta" in result:
        result["rope_theta"] = trained.rotary_emb_base
    if "rope_scaling" in result:
        result["rope_scaling"] = scaling
    return result
