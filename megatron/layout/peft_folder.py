"""The contents of a peft folder, read from and written to `adapter_config.json` and the header of the weights.

Only plain LoRA on linear layers is supported. Anything that would change the meaning of the factors (DoRA, other scales
for some layers, fully trained modules, ...) is refused by name. No tensor is read here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError
from megatron.layout.adapter import PEFT_PREFIX, PROJECTIONS, in_table_order

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FOLDER = "adapter"  # in a checkpoint of a run that trains one
_FACTOR = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_OF_A_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")
# Fields that do not change what the saved factors mean.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern"),
    *("revision", "target_modules", "task_type", "use_rslora", "megatron_core", "qalora_group_size"),
    *("bias", "init_lora_weights", "runtime_config", "ensure_weight_tying"),
}
# Initializations that leave the base weights as they were.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_LARGEST_HEADER = 1 << 27


class PeftError(UserError):
    """A folder that is not a peft adapter, or not a supported one."""


@dataclass(frozen=True)
class PeftAdapter:
    """A plain LoRA of a Llama with the same projections, at the same rank, in every decoder layer.

    `shapes` are those of the factors by their names in the file; `base_name` is the base named in the configuration.
    """

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    num_layers: int
    base_name: str | None
    shapes: Mapping[str, tuple[int, ...]]


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """The factor on B A: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def factor_of(key: str) -> tuple[str, str] | None:
    """(module, "A" or "B") of a tensor's name in the weights; None if it is no factor of a linear layer."""
    match = _FACTOR.fullmatch(key)
    return None if match is None else (match[1], match[2])


def config_problem(config: Mapping[str, Any]) -> str | None:
    """The unsupported part of an adapter's configuration, in one sentence."""
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')!r}; only LORA is read"
    if config.get("bias", "none") != "none":
        return f"bias is {config['bias']!r}; a Llama has no biases"
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS:
        return f"init_lora_weights {start!r} changes the base weights; merge the adapter with peft first"
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        return f"lora_alpha must be a positive number, not {alpha!r}"
    others = sorted(key for key, value in config.items() if key not in _HARMLESS and value)
    if others:
        return f"{', '.join(others)} is not understood here; merge the adapter with peft first"
    return None


def adapter_folder(path: Path) -> Path | None:
    """The peft folder that `path` names: itself, or that of a checkpoint or of the latest one; None without any."""
    if not path.is_dir():
        return None
    for root in (path, path / _latest(path)):
        if (root / FOLDER).is_dir():
            return root / FOLDER
    return path


def _latest(root: Path) -> str:
    try:
        return (root / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return "."


def read_adapter(folder: Path) -> PeftAdapter:
    """An adapter's description from the two files of its folder; PeftError names the file and what does not fit."""
    config = _config(folder)
    problem = config_problem(config)
    if problem is not None:
        raise PeftError(f"{folder / CONFIG}: {problem}")
    shapes = _header(folder / WEIGHTS)
    # The rank of every factor, and the layers that have each kind of factor.
    ranks: dict[str, int] = {}
    found: dict[str, set[int]] = {}
    for key, shape in shapes.items():
        factor = factor_of(key)
        place = None if factor is None else _OF_A_LAYER.fullmatch(factor[0])
        if factor is None or place is None or place[2] not in PROJECTIONS:
            raise PeftError(
                f"{folder / WEIGHTS}: {key} is no factor of {', '.join(PROJECTIONS)}; only plain LoRA of the decoder's "
                f"projections is read"
            )
        if len(shape) != 2:
            raise PeftError(f"{folder / WEIGHTS}: {key} has shape {list(shape)}; a factor is a matrix")
        ranks[key] = shape[0 if factor[1] == "A" else 1]
        found.setdefault(f"{place[2]}.lora_{factor[1]}", set()).add(int(place[1]))
    if not found:
        raise PeftError(f"{folder / WEIGHTS} holds no factors")
    if len(set(ranks.values())) > 1:
        odd = [key for key in ranks if ranks[key] != next(iter(ranks.values()))]
        raise PeftError(
            f"{folder / WEIGHTS}: rank {ranks[odd[0]]} in {odd[0]}, {next(iter(ranks.values()))} in others; an adapter "
            f"of several ranks (rank_pattern) can be merged into its base, not trained"
        )
    # Every layer must have the same factors.
    num_layers = 1 + max(max(layers) for layers in found.values())
    targets = in_table_order([name.split(".")[0] for name in found])
    for name in (f"{target}.lora_{factor}" for target in targets for factor in "AB"):
        lacking = sorted(set(range(num_layers)) - found.get(name, set()))
        if lacking:
            raise PeftError(
                f"{folder / WEIGHTS}: layer {lacking[0]} has no {name}, others have; an adapter of some layers alone "
                f"(layers_to_transform) can be merged into its base, not trained"
            )
    named = config.get("base_model_name_or_path")
    return PeftAdapter(
        rank=next(iter(ranks.values())),
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        targets=targets,
        num_layers=num_layers,
        base_name=named if isinstance(named, str) and named else None,
        shapes=shapes,
    )


def config_text(*, rank: int, alpha: float, rslora: bool, targets: tuple[str, ...], base_name: str | None) -> str:
    """An `adapter_config.json` from which peft loads the adapter."""
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": rslora,
    }
    return json.dumps(config, indent=2) + "\n"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            older = name == WEIGHTS and (folder / "adapter_model.bin").is_file()
            advice = (
                "adapter_model.bin is a pickle; load it with peft and save it again with safe_serialization=True"
                if older
                else "an adapter is a folder that peft's save_pretrained wrote, or a checkpoint of a LoRA run"
            )
            raise PeftError(f"{folder / name} is missing; {advice}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PeftError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise PeftError(f"{path} holds a {type(config).__name__}, expected a mapping")
    return config


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= _LARGEST_HEADER:
                raise ValueError(f"its header would have {size} bytes")
            header = json.loads(file.read(size))
        return {str(key): tuple(value["shape"]) for key, value in header.items() if key != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PeftError(f"{path} is not a safetensors file: {error}") from error
