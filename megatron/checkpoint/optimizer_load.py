"""An engine's optimizer from a checkpoint: of version 2 at any layout, of version 1 at the layout that wrote it.

Nothing is gathered in memory: each range is read in blocks, straight into the engine's tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron.checkpoint import version1
from megatron.checkpoint.discovery import OPTIMIZER_FILE
from megatron.checkpoint.manifest import FileEntry, Manifest, file_checksum
from megatron.checkpoint.optimizer_files import OptimizerIndex, optimizer_file_name
from megatron.checkpoint.optimizer_reader import StateReader
from megatron.checkpoint.state import rng_from_bytes
from megatron.checkpoint.state_ranges import ITEM, block_bytes
from megatron.checkpoint.torch_files import read_file
from megatron.common.errors import CheckpointError
from megatron.layout import TensorRange, TensorSplit

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine


class SavedOptimizer:
    """The optimizer files of a checkpoint, as one rank needs them."""

    def __init__(self, folder: Path, manifest: Manifest, split: TensorSplit) -> None:
        self.folder, self.split = folder, split
        self.files = {name: entry for name, entry in manifest.files.items() if OPTIMIZER_FILE.fullmatch(name)}
        self.index = OptimizerIndex.of(manifest, split)

    @property
    def by_ranges(self) -> bool:
        """Version 2: any layout can read it."""
        return any(entry.ranges for entry in self.files.values())

    def load(self, engine: Engine, here: TensorSplit) -> None:
        """Fill the engine's optimizer; its weights are loaded. Not collective; CheckpointError names what is wrong."""
        if not self.by_ranges:
            engine.load_shards(_Version1(*self._version1_file(engine)).read)
            return
        with StateReader(self.folder, self.index, here) as reader:
            engine.load_shards(_Ranges(reader, self.index).read)

    def random_states(self, engine: Engine) -> dict[str, Any] | None:
        """Those that this rank saved; None if there are none. Only at the layout of the checkpoint."""
        if not self.by_ranges:
            path, _ = self._version1_file(engine)
            found: dict[str, Any] | None = _read_version1(path).get("rng")
            return found
        name = optimizer_file_name(engine.place.rank)
        entry = self.files.get(name)
        if entry is None or entry.random_state is None:
            return None
        stored = entry.random_state
        with open(self.folder / name, "rb") as file:
            file.seek(stored.offset)
            data = file.read(stored.size)
        if (found_crc := zlib.crc32(data)) != stored.crc:
            raise CheckpointError(
                f"{self.folder / name} is damaged: the random states have checksum crc32:{found_crc:08x}, the manifest "
                f"says crc32:{stored.crc:08x}"
            )
        return rng_from_bytes(data)

    def _version1_file(self, engine: Engine) -> tuple[Path, FileEntry]:
        wanted = (engine.place.dp_rank, engine.place.model_rank)
        for name, entry in self.files.items():
            if version1.rank_of_file(name) == wanted:
                return self.folder / name, entry
        raise CheckpointError(f"{self.folder} lacks the optimizer file of dp_rank {wanted[0]}, mp_rank {wanted[1]:02d}")


class _Ranges:
    """Reads version 2 through a buffer of one block."""

    def __init__(self, reader: StateReader, index: OptimizerIndex) -> None:
        self.reader, self.index = reader, index
        self.buffer = np.empty(block_bytes() // ITEM, dtype=np.float32)

    def read(self, where: TensorRange, tensors: Mapping[str, Tensor]) -> int:
        step = len(self.buffer)
        for kind, tensor in tensors.items():
            for start in range(where.start, where.stop, step):
                part = replace(where, start=start, stop=min(start + step, where.stop))
                block = self.buffer[: len(part)]
                self.reader.read(part, kind, block)
                if not np.isfinite(block).all():
                    raise CheckpointError(not_finite(f"{self.reader.folder}: {kind} of {part}"))
                tensor[start - where.start :][: len(part)].copy_(torch.from_numpy(block))
        return self.index.step(where.layer, where.tensor)


def not_finite(place: str) -> str:
    return (
        f"{place} holds values that are not finite; every step from here on would be skipped. Go back to an earlier "
        f"checkpoint with --iteration N"
    )


# --- version 1


class _Fragment:
    """In place of DeepSpeed's class in the file: `numel` and `start` in the rank's partition."""

    numel: int
    start: int


class _Closed:
    """In place of what is of no use here: the loss scaler, the number of the ZeRO stage."""

    def __init__(self, *_: Any) -> None:
        pass


_STAND_INS = (
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Closed, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Closed, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Closed, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)


def _read_version1(path: Path) -> dict[str, Any]:
    content = read_file(path, lazy=True, classes=_STAND_INS)
    if not isinstance(content, dict) or not isinstance(content.get("optimizer_state_dict"), dict):
        raise CheckpointError(f"{path} holds no optimizer state")
    return content


class _Version1:
    """One rank's file, for the rank of the same layout that has the same place."""

    def __init__(self, path: Path, entry: FileEntry) -> None:
        if entry.checksum is not None and (found := file_checksum(path)) != entry.checksum:
            raise CheckpointError(f"{path} is damaged: its checksum is {found}, the manifest says {entry.checksum}")
        optimizer = _read_version1(path)["optimizer_state_dict"]
        self.path = path
        self.masters, self.states = optimizer[version1.MASTERS], optimizer[version1.STATE]["state"]
        self.fragments = {
            version1.tensor_of_parameter(name, str(path)): (group, fragment)
            for group, named in enumerate(optimizer[version1.FRAGMENTS])
            for name, fragment in named.items()
        }

    def read(self, where: TensorRange, tensors: Mapping[str, Tensor]) -> int:
        group, fragment = self.fragments.get((where.layer, where.tensor), (0, None))
        if fragment is None or fragment.numel != len(where):
            has = "nothing" if fragment is None else f"{fragment.numel} elements"
            raise CheckpointError(f"{self.path} holds {has} for {where}: it was saved at another layout")
        state = {"master": self.masters[group], **self.states.get(group, {})}
        for kind, tensor in tensors.items():
            if kind in state:
                part = state[kind].detach()[fragment.start : fragment.start + fragment.numel]
                if not torch.isfinite(part).all():
                    raise CheckpointError(not_finite(f"{self.path}: {kind} of {where}"))
                tensor.copy_(part)
            else:  # saved before the first step
                tensor.zero_()
        return int(state.get("step", 0))
