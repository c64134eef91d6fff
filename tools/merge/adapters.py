"""LoRA adapters in peft's format, added to the weights of their base: W + (alpha / r) B A, in fp32.

Only what `adapter_config.json` says in full is understood; DoRA, biases, trained whole modules and the like are
refused by name. The product is summed over the rank in order, element by element, so that its bits do not depend on
how many rows are computed at a time, as a matrix product's do.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.convert_hf.formats.dtypes import WEIGHT_DTYPES
from tools.convert_hf.formats.safetensors_file import read_safetensors_header
from tools.convert_hf.formats.stored import Stored
from tools.convert_hf.sources.llama_config import read_config_file
from tools.convert_hf.stream.band_io import FilePool, read_band
from tools.convert_hf.stream.tensor_map import Logical, whole_region
from tools.merge.errors import MergeError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields that do not change what the saved factors mean.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern"),
    *("revision", "target_modules", "task_type", "use_rslora", "megatron_core", "qalora_group_size"),
    *("bias", "init_lora_weights", "runtime_config", "ensure_weight_tying"),
}
# Initialisations that leave the base weights as they were.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factors:
    """The two factors of one weight [out, in]: A [r, in], B [out, r]."""

    a: Logical
    b: Logical
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class Adapter:
    """An opened adapter: `factors` by the Hugging Face name of the weight they change."""

    root: Path
    base_name: str | None  # what it says it was trained on
    factors: dict[str, Factors]

    @property
    def rank(self) -> int:
        return max(f.rank for f in self.factors.values())

    @property
    def files(self) -> list[Path]:
        return [self.root / CONFIG, self.root / WEIGHTS]

    def add(self, pool: FilePool, name: str, start: int, stop: int, weight: Tensor) -> None:
        """Add the adapter's part to fp32 rows `start:stop` of the weight `name`, in place."""
        factors = self.factors.get(name)
        if factors is None:
            return
        a = _read(pool, factors.a, 0, factors.rank)
        b = _read(pool, factors.b, start, stop)
        rows = weight.view(stop - start, -1)
        delta, product = torch.zeros_like(rows), torch.empty_like(rows)
        for k in range(factors.rank):
            torch.mul(b[:, k : k + 1], a[k : k + 1], out=product)
            delta.add_(product)
        rows.add_(delta.mul_(factors.scale))


def _read(pool: FilePool, tensor: Logical, start: int, stop: int) -> Tensor:
    data = bytearray((stop - start) * tensor.shape[1] * tensor.dtype.itemsize)
    read_band(pool, tensor, start, stop, memoryview(data))
    return torch.frombuffer(data, dtype=getattr(torch, tensor.dtype.name)).view(stop - start, -1).float()


def open_adapter(path: Path, tensors: dict[str, Logical]) -> Adapter:
    """Read the headers of a peft folder for a model with these `tensors`; MergeError says what does not fit."""
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise MergeError(f"{path / name} is missing; an adapter is a folder that peft's save_pretrained wrote")
    where = str(path / CONFIG)
    config = read_config_file(path / CONFIG)
    _check_config(config, where)
    stored: dict[str, dict[str, Stored]] = {}
    for key, tensor in read_safetensors_header(path / WEIGHTS).items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise MergeError(f"{path / WEIGHTS}: {key} is not a factor of a linear layer; only plain LoRA is read")
        stored.setdefault(match[1] + ".weight", {})[match[2]] = tensor
    if not stored:
        raise MergeError(f"{path / WEIGHTS} holds no factors")
    factors = {name: _factors(name, pair, config, path, tensors) for name, pair in stored.items()}
    named = config.get("base_model_name_or_path")
    return Adapter(path, named if isinstance(named, str) and named else None, factors)


def _check_config(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise MergeError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA is read")
    if config.get("bias", "none") != "none":
        raise MergeError(f"{where}: bias is {config['bias']!r}; a Llama has no biases")
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS:
        raise MergeError(
            f"{where}: init_lora_weights {start!r} changes the base weights; merge the adapter with peft first"
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise MergeError(f"{where}: lora_alpha must be a positive number, not {alpha!r}")
    others = sorted(key for key, value in config.items() if key not in _HARMLESS and value)
    if others:
        raise MergeError(f"{where}: {', '.join(others)} is not understood here; merge the adapter with peft first")


def _factors(
    name: str, pair: dict[str, Stored], config: dict[str, Any], path: Path, tensors: dict[str, Logical]
) -> Factors:
    where = f"{path / WEIGHTS}: {name}"
    if set(pair) != {"A", "B"}:
        raise MergeError(f"{where} has only one of its two factors")
    if name not in tensors:
        raise MergeError(f"{where} is not a tensor of the model it is added to; this is an adapter of another base")
    a, b, shape = pair["A"], pair["B"], tensors[name].shape
    if len(a.shape) != 2 or len(b.shape) != 2 or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
        raise MergeError(
            f"{where}: factors {list(b.shape)} and {list(a.shape)} do not make {list(shape)}; this is an adapter of "
            f"another base"
        )
    for factor in (a, b):
        if factor.dtype.name not in WEIGHT_DTYPES:
            raise MergeError(f"{where} is {factor.dtype.name}; factors may be {', '.join(WEIGHT_DTYPES)}")
    rank = a.shape[0]
    if rank < 1:
        raise MergeError(f"{where} has rank 0")
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(_logical(a), _logical(b), scale)


def _logical(stored: Stored) -> Logical:
    return Logical(stored.name, stored.shape, stored.dtype, [whole_region(stored, stored.name)])
