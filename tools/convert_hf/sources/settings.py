"""What a checkpoint will be run with: epsilon and rotary settings, which no tensor shows.

For a Hugging Face folder that is config.json. For GPT-NeoX it is the training configuration: what the manifest of a
training checkpoint records, the model.yml that a conversion wrote, or the `configs/` that GPT-NeoX keeps beside its
weights; only without any of these is it the config.json that travelled along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.convert_hf.errors import ConvertError
from tools.convert_hf.sources.opening import Checkpoint

TRAINING = "training"  # `written_by` of the trainer's manifests
_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Settings:
    """Hyperparameters with the place they were read from; None where that place does not say."""

    origin: str
    rms_norm_epsilon: float | None
    rotary_emb_base: float | None
    rope_scaling: dict[str, float] | None  # None: no scaling

    def differences(self, other: Settings) -> list[tuple[str, Any, Any]]:
        """(key, own value, other's value) of all that both know and that differs."""
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in ("rms_norm_epsilon", "rotary_emb_base")]
        found = [(n, a, b) for n, a, b in pairs if a is not None and b is not None and a != b]
        if self.rope_scaling != other.rope_scaling:
            found.append(("rope_scaling", self.rope_scaling, other.rope_scaling))
        return found


def config_settings(checkpoint: Checkpoint) -> Settings | None:
    """What config.json says."""
    config = checkpoint.config
    if config is None or checkpoint.side_folder is None:
        return None
    scaling = _scaling(config.rope_scaling, "config.json")
    origin = str(checkpoint.side_folder / "config.json")
    return Settings(origin, config.rms_norm_epsilon, config.rotary_emb_base, scaling)


def run_settings(checkpoint: Checkpoint) -> Settings | None:
    """What the checkpoint would be run with, None if nothing beside it says."""
    if checkpoint.kind.startswith("neox"):
        if checkpoint.provenance.get("written_by") == TRAINING:
            return _from_keys(checkpoint.provenance.get("config"), f"{checkpoint.root}/manifest.json")
        model_yml = checkpoint.root.parent / "model.yml"
        configs = sorted((checkpoint.root / "configs").glob("*.yml")) if not model_yml.is_file() else [model_yml]
        keys: dict[str, Any] = {}
        for path in configs:
            keys |= _read_yaml(path)
        if "num_layers" in keys:
            return _from_keys(keys, str(configs[0] if len(configs) == 1 else configs[0].parent))
    return config_settings(checkpoint)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path} must hold a mapping")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def _from_keys(keys: Any, origin: str) -> Settings:
    if not isinstance(keys, Mapping):
        raise ConvertError(f"{origin} does not record the configuration")
    epsilon = _number(keys.get("rms_norm_epsilon"), f"{origin}: rms_norm_epsilon")
    base = _number(keys.get("rotary_emb_base"), f"{origin}: rotary_emb_base")
    return Settings(origin, epsilon, base, _scaling(keys.get("rope_scaling"), origin))


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


def refuse_differences(checkpoint: Checkpoint) -> None:
    """Stop an export whose config.json would describe another model than the one that was trained."""
    trained, written = run_settings(checkpoint), config_settings(checkpoint)
    if trained is None or written is None:
        return
    for key, ours, theirs in trained.differences(written):
        raise ConvertError(
            f"{key} is {json.dumps(ours)} in {trained.origin}, but {json.dumps(theirs)} in {written.origin}: the "
            f"exported model would not be the trained one. Correct the wrong one of the two, or say "
            f"--trained-settings to write what training used into the exported config.json"
        )


def with_trained_settings(checkpoint: Checkpoint, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with epsilon and rotary settings of the training run, in the spelling that it already has."""
    trained = run_settings(checkpoint)
    written = config_settings(checkpoint)
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
