"""The opened models of a merge: any checkpoint that the converter reads, optionally with an adapter."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.manifest import MANIFEST_NAME

from ..convert_hf.errors import ConvertError
from ..convert_hf.formats.dtypes import WEIGHT_DTYPES
from ..convert_hf.sources.adapters import Adapter, check_base, open_adapter
from ..convert_hf.sources.checkpoint import Checkpoint, OpenOptions
from ..convert_hf.sources.opening import open_checkpoint
from ..convert_hf.stream.band_io import FilePool, read_band
from .errors import MergeError
from .recipe import ParentEntry, Recipe


@dataclass
class Parent:
    """An opened model; its tensors are read band by band."""

    entry: ParentEntry
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    @property
    def label(self) -> str:
        return self.entry.label

    def band_bytes(self, name: str, rows: int) -> int:
        tensor = self.checkpoint.tensors[name]
        return rows * (tensor.nbytes // tensor.shape[0])

    def read(self, pool: FilePool, name: str, start: int, stop: int, raw: memoryview) -> Tensor:
        """Rows `start:stop` of a tensor as they are stored, flat, in the memory of `raw`."""
        tensor = self.checkpoint.tensors[name]
        band = raw[: self.band_bytes(name, stop - start)]
        read_band(pool, tensor, start, stop, band)
        return torch.frombuffer(band, dtype=getattr(torch, tensor.dtype.name))

    def widen(self, pool: FilePool, name: str, start: int, stop: int, stored: Tensor, out: Tensor) -> Tensor:
        """Convert rows `start:stop`, given as stored, to fp32, add the adapter, and write them to `out`."""
        out.copy_(stored)
        if self.adapter is not None:
            self.adapter.add(pool, name, start, stop, out)
        return out

    def weight_files(self) -> list[Path]:
        files = {r.stored.path for t in self.checkpoint.tensors.values() for r in t.regions}
        return sorted(files) + (self.adapter.files if self.adapter else [])

    def manifest_hash(self) -> str | None:
        """SHA-256 of the manifest, which holds a checksum of every tensor; None without a manifest."""
        path = self.checkpoint.root / MANIFEST_NAME
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def adapter_hash(self) -> str | None:
        """SHA-256 of the adapter's two files; None without an adapter."""
        if self.adapter is None:
            return None
        digest = hashlib.sha256()
        for path in self.adapter.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def open_parents(recipe: Recipe) -> dict[str, Parent]:
    """Open every model of a recipe, reading headers only; returned by label."""
    parents: dict[str, Parent] = {}
    opened: dict[tuple[str, str], Checkpoint] = {}
    for entry in recipe.parents:
        if not entry.path.is_dir():
            raise MergeError(
                f"{entry.label}: {entry.path} is not a folder. A model is a folder on this machine; download it first"
            )
        key = (os.path.abspath(entry.path), f"{entry.hf_source} {entry.given}")
        if key not in opened:
            opened[key] = _open(entry)
        checkpoint = opened[key]
        for tensor in checkpoint.tensors.values():
            if tensor.dtype.name not in WEIGHT_DTYPES:
                raise MergeError(
                    f"{entry.label}: {tensor.name} is {tensor.dtype.name}; weights may be {', '.join(WEIGHT_DTYPES)}"
                )
        adapter = open_adapter(entry.adapter, checkpoint.tensors) if entry.adapter else None
        if adapter is not None:
            _check_adapter_base(entry, adapter)
        elif entry.adapter_base is not None:
            raise MergeError(f"{entry.label}: adapter_base without an adapter")
        parents[entry.label] = Parent(entry, checkpoint, adapter)
    return parents


def _open(entry: ParentEntry) -> Checkpoint:
    try:
        return open_checkpoint(entry.path, OpenOptions(entry.hf_source, json.loads(entry.given)))
    except ConvertError as error:
        # In a recipe, the converter's options are keys.
        text = re.sub(r"--set (\w+)=(.+)$", r"`set: {\1: \2}` beside the model", str(error))
        text = re.sub(r"--hf-source (\w+)", r"`hf_source: \1` beside the model", text)
        raise MergeError(f"{entry.label}: {text}") from None


def _check_adapter_base(entry: ParentEntry, adapter: Adapter) -> None:
    given = {Path(os.path.abspath(entry.path)).name, entry.label.rsplit("/", 1)[-1], entry.label.split("+")[0]}
    advice = "write `adapter_base: {name}` beside it"
    try:
        check_base(adapter, str(entry.path), given, entry.adapter_base, advice)
    except ConvertError as error:
        raise MergeError(f"{entry.label}: {error}") from None
