"""The fields of a Llama's `config.json`, read without defaults: a missing or unknown field stops the conversion.

Both spellings of rotary scaling are read: `rope_theta` with `rope_scaling`, and the `rope_parameters` of newer
`transformers`. The file itself is copied unchanged; only the fields needed for conversion are parsed here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.layout import LlamaShape, padded_vocab_size

from ..errors import ConvertError
from ..formats.safetensors_file import is_size, read_json
from .patch_config import check_patches, patch_shape

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MAX_JSON = 64_000_000


@dataclass(frozen=True)
class LlamaConfig:
    """The model's hyperparameters. `rope_scaling` is None or a mapping with `rope_type: llama3` and its numbers."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_epsilon: float
    rotary_emb_base: float
    rope_scaling: dict[str, Any] | None
    tied: bool
    dtype: str | None  # as config.json states it, if it does
    patches: dict[str, Any] | None = None  # set for an image model, which has no vocabulary

    def shape(self, padded: int) -> LlamaShape:
        """Tensor sizes with a stored vocabulary of `padded` rows."""
        decoder: dict[str, Any] = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_kv_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
        if self.patches is not None:
            return patch_shape(decoder, self.patches, self.max_position_embeddings)
        return LlamaShape(**decoder, vocab_size=self.vocab_size, padded_vocab_size=padded, tied=self.tied)

    def shape_for(self, divisible_by: int, tp: int) -> LlamaShape:
        """Tensor sizes for `tp` ranks; ConvertError if the model cannot be split into that many."""
        if divisible_by < 1 or tp < 1:
            raise ConvertError(f"--tp {tp} and --vocab-divisible-by {divisible_by} must be at least 1")
        shape = self.shape(padded_vocab_size(self.vocab_size, divisible_by, tp))
        try:
            shape.check_tensor_parallel(tp)
        except ValueError as error:
            raise ConvertError(f"--tp {tp} does not fit this model: {error}") from None
        return shape


def read_config_file(path: Path) -> dict[str, Any]:
    """The JSON object of a config file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ConvertError(f"{path} is larger than any configuration: {path.stat().st_size} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from None
    value = read_json(text, str(path))
    if not isinstance(value, dict):
        raise ConvertError(f"{path} must hold a JSON object")
    return value


def parse_config(raw: dict[str, Any], where: str, given: dict[str, Any] | None = None) -> LlamaConfig:
    """Parse a Hugging Face Llama configuration.

    `given` holds fields from the command line (`--set`); they may fill absent fields, never replace present ones.
    ConvertError names `where` and the field.
    """
    raw = _with_given(raw, where, given or {})
    if raw.get("model_type") != "llama":
        raise ConvertError(f"{where}: model_type is {raw.get('model_type')!r}; only 'llama' is supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConvertError(f"{where}: hidden_act is {raw['hidden_act']!r}; a Llama has 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ConvertError(f"{where}: {key} is set; models with biases are not supported")
    if raw.get("quantization_config"):
        raise ConvertError(f"{where}: the weights are quantized (quantization_config); convert the original weights")
    theta, scaling = _rope(raw, where)
    patches = check_patches(raw["patches"], where) if raw.get("patches") is not None else None
    config = LlamaConfig(
        num_layers=_whole(raw, "num_hidden_layers", where),
        hidden_size=_whole(raw, "hidden_size", where),
        num_attention_heads=_whole(raw, "num_attention_heads", where),
        num_kv_heads=_whole(raw, "num_key_value_heads", where),
        intermediate_size=_whole(raw, "intermediate_size", where),
        vocab_size=_whole(raw, "vocab_size", where) if patches is None else 0,
        max_position_embeddings=_whole(raw, "max_position_embeddings", where),
        rms_norm_epsilon=_positive(raw, "rms_norm_eps", where),
        rotary_emb_base=theta,
        rope_scaling=scaling,
        tied=_flag(raw, "tie_word_embeddings", where),
        dtype=_dtype(raw),
        patches=patches,
    )
    if config.hidden_size % config.num_attention_heads or config.num_attention_heads % config.num_kv_heads:
        raise ConvertError(
            f"{where}: hidden_size {config.hidden_size}, num_attention_heads {config.num_attention_heads} and "
            f"num_key_value_heads {config.num_kv_heads} do not divide one another"
        )
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim != config.hidden_size // config.num_attention_heads:
        raise ConvertError(
            f"{where}: head_dim is {head_dim!r}; this project supports hidden_size / num_attention_heads = "
            f"{config.hidden_size // config.num_attention_heads} only"
        )
    return config


def _with_given(raw: dict[str, Any], where: str, given: dict[str, Any]) -> dict[str, Any]:
    for key, value in given.items():
        if key in raw and raw[key] != value:
            raise ConvertError(f"{where}: {key} is {raw[key]!r}; --set {key}={value!r} may only fill an absent field")
    return given | raw


def _missing(key: str, where: str, hint: str = "VALUE") -> ConvertError:
    return ConvertError(
        f"{where}: the field {key} is missing and is not guessed; if you know it, add --set {key}={hint}"
    )


def _whole(raw: dict[str, Any], key: str, where: str) -> int:
    if key not in raw:
        raise _missing(key, where)
    value = raw[key]
    if not is_size(value) or not 0 < value < 1 << 40:
        raise ConvertError(f"{where}: {key} must be a positive whole number, not {str(value)[:60]!r}")
    return int(value)


def _positive(raw: dict[str, Any], key: str, where: str) -> float:
    if key not in raw:
        raise _missing(key, where)
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConvertError(f"{where}: {key} must be a positive number, not {str(value)[:60]!r}")
    return float(value)


def _flag(raw: dict[str, Any], key: str, where: str) -> bool:
    if key not in raw:
        raise _missing(key, where, "true or false")
    if not isinstance(raw[key], bool):
        raise ConvertError(f"{where}: {key} must be true or false, not {raw[key]!r}")
    return bool(raw[key])


def _dtype(raw: dict[str, Any]) -> str | None:
    value = raw.get("dtype", raw.get("torch_dtype"))
    return value.removeprefix("torch.") if isinstance(value, str) else None


def _rope(raw: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling from either spelling; if both are present, they must agree."""
    parameters = raw.get("rope_parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise ConvertError(f"{where}: rope_parameters must be a JSON object")
        theta = _positive(parameters, "rope_theta", f"{where}: rope_parameters")
        scaling = _scaling({k: v for k, v in parameters.items() if k != "rope_theta"}, f"{where}: rope_parameters")
        if "rope_theta" in raw and raw["rope_theta"] != theta:
            raise ConvertError(f"{where}: rope_theta is {raw['rope_theta']!r}, but {theta!r} in rope_parameters")
        if raw.get("rope_scaling") is not None and _scaling(raw["rope_scaling"], where) != scaling:
            raise ConvertError(f"{where}: rope_scaling and rope_parameters disagree")
        return theta, scaling
    theta = _positive(raw, "rope_theta", where)
    if "rope_scaling" not in raw:
        raise _missing("rope_scaling", where, "null (none) or the mapping as JSON")
    return theta, None if raw["rope_scaling"] is None else _scaling(raw["rope_scaling"], f"{where}: rope_scaling")


def _scaling(value: Any, where: str) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise ConvertError(f"{where} must be a JSON object")
    kind = value.get("rope_type", value.get("type"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConvertError(f"{where}: rope_type {kind!r} is not supported; known are 'llama3' and 'default'")
    unknown = sorted(set(value) - set(_LLAMA3_KEYS) - {"rope_type", "type"})
    if unknown:
        raise ConvertError(f"{where}: {', '.join(unknown)} is not a field of rope_type llama3")
    for key in _LLAMA3_KEYS:
        _positive(value, key, where)
    return {"rope_type": "llama3"} | {key: value[key] for key in _LLAMA3_KEYS}


def parse_given(pairs: list[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` options into a mapping; a VALUE that is not JSON is taken as a plain string."""
    result = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ConvertError(f"--set {pair}: expected KEY=VALUE")
        try:
            result[key] = json.loads(text)
        except ValueError:
            result[key] = text
    return result
