"""LoRA adapters in peft's format, added to the weights of their base: W + (alpha / r) B A.

Every field of `adapter_config.json` must be known (`megatron.layout.peft_folder`). The product is accumulated over the
adapter's rank in order, element by element: unlike a matrix product, its bits do not depend on how many rows are
computed at a time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.layout.peft_folder import CONFIG, WEIGHTS, adapter_folder, config_problem, factor_of, scale_of

from ..errors import ConvertError
from ..formats.dtypes import WEIGHT_DTYPES
from ..formats.safetensors_file import read_safetensors_header
from ..formats.stored import Stored
from ..stream.band_io import FilePool, read_band
from ..stream.tensor_map import Logical, whole_region
from .llama_config import read_config_file


@dataclass(frozen=True)
class StoredFactors:
    """The two factors of one weight [out, in]: A [r, in], B [out, r]."""

    a: Logical
    b: Logical
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class Adapter:
    """An opened adapter: `factors`, keyed by the Hugging Face name of the weight they modify."""

    root: Path
    base_name: str | None  # the base recorded in its configuration
    factors: dict[str, StoredFactors]
    _held: threading.local = field(default_factory=threading.local, repr=False)

    @property
    def rank(self) -> int:
        return max(f.rank for f in self.factors.values())

    @property
    def files(self) -> list[Path]:
        return [self.root / CONFIG, self.root / WEIGHTS]

    def add(self, pool: FilePool, name: str, start: int, stop: int, weight: Tensor) -> None:
        """Add the adapter's delta to rows `start:stop` of the weight `name`, in place and in the weight's type."""
        factors = self.factors.get(name)
        if factors is None:
            return
        a = self._a(pool, name, factors, weight.dtype)
        b = _read(pool, factors.b, start, stop).to(weight.dtype)
        rows = weight.view(stop - start, -1)
        delta, product = torch.zeros_like(rows), torch.empty_like(rows)
        for k in range(factors.rank):
            torch.mul(b[:, k : k + 1], a[k : k + 1], out=product)
            delta.add_(product)
        rows.add_(delta.mul_(factors.scale))

    def _a(self, pool: FilePool, name: str, factors: StoredFactors, dtype: torch.dtype) -> Tensor:
        """Factor A of a weight, cached per thread until another weight is requested."""
        held: tuple[str, Tensor] | None = self._held.__dict__.get("a")
        if held is None or held[0] != name:
            held = (name, _read(pool, factors.a, 0, factors.rank).to(dtype))
            self._held.a = held
        return held[1]


def _read(pool: FilePool, tensor: Logical, start: int, stop: int) -> Tensor:
    data = bytearray((stop - start) * tensor.shape[1] * tensor.dtype.itemsize)
    read_band(pool, tensor, start, stop, memoryview(data))
    return torch.frombuffer(data, dtype=getattr(torch, tensor.dtype.name)).view(stop - start, -1).float()


def open_adapter(path: Path, tensors: dict[str, Logical]) -> Adapter:
    """Read the headers of an adapter for a model with these `tensors`; ConvertError if it does not fit.

    `path` is a peft folder, or the checkpoint folder of a LoRA run.
    """
    path = adapter_folder(path) or path
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise ConvertError(f"{path / name} is missing; an adapter is a folder that peft's save_pretrained wrote")
    where = str(path / CONFIG)
    config = read_config_file(path / CONFIG)
    problem = config_problem(config)
    if problem is not None:
        raise ConvertError(f"{where}: {problem}")
    stored: dict[str, dict[str, Stored]] = {}
    for key, tensor in read_safetensors_header(path / WEIGHTS).items():
        factor = factor_of(key)
        if factor is None:
            raise ConvertError(
                f"{path / WEIGHTS}: {key} is not a factor of a linear layer; only plain LoRA is supported"
            )
        stored.setdefault(factor[0] + ".weight", {})[factor[1]] = tensor
    if not stored:
        raise ConvertError(f"{path / WEIGHTS} holds no factors")
    factors = {name: _factors(name, pair, config, path, tensors) for name, pair in stored.items()}
    named = config.get("base_model_name_or_path")
    return Adapter(path, named if isinstance(named, str) and named else None, factors)


def _factors(
    name: str, pair: dict[str, Stored], config: dict[str, Any], path: Path, tensors: dict[str, Logical]
) -> StoredFactors:
    where = f"{path / WEIGHTS}: {name}"
    if set(pair) != {"A", "B"}:
        raise ConvertError(f"{where} has only one of its two factors")
    if name not in tensors:
        raise ConvertError(f"{where} is not a tensor of the model it is added to; the adapter belongs to another base")
    a, b, shape = pair["A"], pair["B"], tensors[name].shape
    if len(a.shape) != 2 or len(b.shape) != 2 or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
        raise ConvertError(
            f"{where}: factors {list(b.shape)} and {list(a.shape)} do not make {list(shape)}; the adapter belongs to "
            f"another base"
        )
    for factor in (a, b):
        if factor.dtype.name not in WEIGHT_DTYPES:
            raise ConvertError(f"{where} is {factor.dtype.name}; factors may be {', '.join(WEIGHT_DTYPES)}")
    rank = a.shape[0]
    if rank < 1:
        raise ConvertError(f"{where} has rank 0")
    scale = scale_of(config["lora_alpha"], rank, bool(config.get("use_rslora")))
    return StoredFactors(_logical(a), _logical(b), scale)


def _logical(stored: Stored) -> Logical:
    return Logical(stored.name, stored.shape, stored.dtype, [whole_region(stored, stored.name)])


def check_base(adapter: Adapter, base: str, names: set[str], stated: str | None, advice: str) -> None:
    """Check the base recorded in an adapter, because shapes cannot distinguish models of the same size.

    ConvertError with `advice` unless it is one of `names`, or `stated`. `base` is the model the adapter is added to.
    """
    if adapter.base_name is None:
        return
    named = adapter.base_name.rstrip("/").rsplit("/", 1)[-1]
    if named not in names and stated != adapter.base_name:
        raise ConvertError(
            f"the adapter {adapter.root} was trained on {adapter.base_name!r}, but would be added to "
            f"{base}. If that is the same model, {advice.format(name=adapter.base_name)}"
        )
