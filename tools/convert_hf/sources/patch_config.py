"""The description of an image-patch model: a LlamaConfig without a vocabulary, and the mapping `patches`.

Such a run does not start from a published model, so an export derives `config.json` from what training recorded in the
manifest. It includes the mapping `patches`, which is also written to `patches.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron.layout import PatchShape

from ..errors import ConvertError
from ..formats.safetensors_file import is_size

PATCHES_FILE = "patches.json"
_SIZES = ("size", "channels")
_WORDS = {"order": ("spiral", "raster"), "normalise": ("none", "patch"), "tokenizer": ("mlp", "affine")}
_DTYPES = {"fp32": "float32", "bfloat16": "bfloat16", "fp16": "float16"}


def check_patches(value: Any, where: str) -> dict[str, Any]:
    """Validate the mapping `patches` of a config.json. ConvertError if it is invalid."""
    if not isinstance(value, dict):
        raise ConvertError(f"{where}: patches must be a JSON object")
    for name in _SIZES:
        if not is_size(value.get(name)) or not 0 < value[name] < 1 << 20:
            raise ConvertError(f"{where}: patches.{name} must be a positive whole number, not {value.get(name)!r}")
    for name, known in (_WORDS | {"positions": ("none", "learned")}).items():
        if value.get(name) not in known:
            raise ConvertError(f"{where}: patches.{name} is {value.get(name)!r}; known are {' and '.join(known)}")
    return value


def patch_shape(decoder: Mapping[str, int], patches: Mapping[str, Any], max_positions: int) -> PatchShape:
    """Tensor sizes of an image model, from the decoder's sizes and a mapping validated by `check_patches`."""
    said = {name: patches[name] for name in ("size", "channels", "tokenizer", "positions")}
    return PatchShape.of(decoder, **said, max_positions=max_positions)


def trained_config(provenance: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """`config.json` of a training run on images, from its manifest; None for a text model. ConvertError if the manifest
    is incomplete."""
    recorded = provenance.get("shape")
    if not isinstance(recorded, dict) or "patch_values" not in recorded:
        return None
    facts = provenance.get("facts")
    try:
        shape = PatchShape(**recorded)
        model, run = facts["model"], facts["run"]  # type: ignore[index]
        scaling = model["rope_scaling"]
        rope = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
        return {
            "architectures": ["LlamaModel"],
            "model_type": "llama",
            "hidden_act": "silu",
            "num_hidden_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "intermediate_size": shape.intermediate_size,
            "vocab_size": 1,  # required by transformers; no tensor has these rows
            "bos_token_id": None,
            "eos_token_id": None,
            "max_position_embeddings": run["max_position_embeddings"],
            "rms_norm_eps": model["rms_norm_epsilon"],
            "rope_parameters": {**rope, "rope_theta": model["rotary_emb_base"]},
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": _DTYPES[provenance["precision"]],
            "patches": check_patches(model["patches"], where),
        }
    except (TypeError, KeyError, AttributeError):
        raise ConvertError(f"{where}: the manifest's description of this image model is incomplete") from None


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
