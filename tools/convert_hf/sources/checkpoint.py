"""An opened checkpoint of any kind: the location of every logical tensor's bytes, and the metadata of the model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron.layout import LlamaShape

from ..errors import ConvertError
from ..stream.band_io import FilePool, bands, read_band
from ..stream.tensor_map import Logical, whole_region
from .llama_config import LlamaConfig
from .settings import Settings, settings_of_config


@dataclass
class OpenOptions:
    """Options that complete what a checkpoint says about itself."""

    hf_source: Path | None = None  # folder whose config.json and side files describe a NeoX checkpoint
    given: dict[str, Any] = field(default_factory=dict)  # config fields stated with --set


@dataclass
class Checkpoint:
    """An opened checkpoint. `tensors` maps Hugging Face names to logical tensors, unpadded if the padding is known."""

    packed_by_rank: ClassVar[bool] = False  # each tensor-parallel rank has its own files, with packed tensors

    root: Path  # the folder that holds the weight files
    kind: str
    tensors: dict[str, Logical]
    shape: LlamaShape
    config: LlamaConfig | None = None
    config_text: bytes | None = None  # config.json, byte for byte (or as derived from params.json)
    side_folder: Path | None = None  # folder of tokenizer, license, ...
    tp: int = 1
    divisible_by: int | None = None
    position: dict[str, Any] = field(default_factory=dict)  # training position recorded in a training checkpoint
    given: dict[str, Any] = field(default_factory=dict)  # config fields stated with --set, now or at conversion
    notes: list[str] = field(default_factory=list)
    duplicates: list[tuple[Logical, Logical, str]] = field(default_factory=list)  # must be bit-equal
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        """Training iteration of the weights; 0 for a published model."""
        return 0

    def describe(self) -> str:
        split = f", TP {self.tp}" if self.tp > 1 or self.packed_by_rank else ""
        total = sum(t.nbytes for t in self.tensors.values())
        return f"{self.root} ({self.kind}{split}, {len(self.tensors)} tensors, {total:,} bytes)"

    def config_settings(self) -> Settings | None:
        """Epsilon and rotary settings of config.json; None if there is none."""
        if self.config is None or self.side_folder is None:
            return None
        return settings_of_config(self.config, str(self.side_folder / "config.json"))

    def run_settings(self) -> Settings | None:
        """Epsilon and rotary settings to run the checkpoint with; None if no file gives them."""
        return self.config_settings()


class CheckpointSource(Protocol):
    """One kind of checkpoint folder. `names` are the entries of the folder `path`."""

    expected: str  # the files that make such a folder, for error messages

    def recognizes(self, path: Path, names: list[str]) -> bool: ...

    def open(self, path: Path, names: list[str], options: OpenOptions) -> Checkpoint:
        """Read headers only. ConvertError states what is missing or wrong."""
        ...


def check_shape(tensor_shape: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    if tensor_shape != expected:
        raise ConvertError(f"{where} has shape {list(tensor_shape)}, the configuration says {list(expected)}")


def check_duplicates(checkpoint: Checkpoint, chunk: int = 1 << 22) -> None:
    """Compare all copies of each tensor byte by byte. ConvertError if they differ: copies are never averaged."""
    pool = FilePool(os.O_RDONLY)
    try:
        for tensor in checkpoint.tensors.values():
            for copy in tensor.replicas:
                other = Logical(tensor.name, tensor.shape, copy.dtype, [whole_region(copy, tensor.name)])
                if not bit_equal(pool, tensor, other, chunk):
                    raise ConvertError(
                        f"{copy.name} differs between tensor-parallel ranks: {tensor.regions[0].stored.path} and "
                        f"{copy.path}. It must be the same on all: a rank diverged in training. Nothing is averaged"
                    )
        for one, two, message in checkpoint.duplicates:
            if not bit_equal(pool, one, two, chunk):
                raise ConvertError(message)
    finally:
        pool.close()


def bit_equal(pool: FilePool, one: Logical, two: Logical, chunk: int) -> bool:
    """Whether two logical tensors have the same type, shape and bytes, compared `chunk` bytes at a time."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    for start, stop in bands(one, chunk):
        size = (stop - start) * one.nbytes // one.shape[0]
        left, right = bytearray(size), bytearray(size)
        read_band(pool, one, start, stop, memoryview(left))
        read_band(pool, two, start, stop, memoryview(right))
        if left != right:
            return False
    return True
