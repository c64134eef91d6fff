"""Loads an engine's optimizer from a checkpoint of any layout: our files, or DeepSpeed's (version 1, GPT-NeoX).

Nothing is gathered in memory: each range is read in blocks, straight into the engine's tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.checkpoint.discovery import OPTIMIZER_FILE
from megatron.checkpoint.manifest import file_checksum
from megatron.checkpoint.optimizer_files import OptimizerIndex, optimizer_file_name
from megatron.checkpoint.optimizer_reader import StateReader
from megatron.checkpoint.saved import SavedCheckpoint
from megatron.checkpoint.state import rng_from_bytes
from megatron.checkpoint.state_ranges import ITEM, block_bytes
from megatron.checkpoint.torch_files import dtype_name, read_file
from megatron.checkpoint.verified import damage
from megatron.checkpoint.zero_files import StoredTensor, ZeroFile, all_ranges, describe, rank_of_file
from megatron.common.crc import crc32
from megatron.common.errors import CheckpointError
from megatron.engine.protocol import Counters, LossScaleState
from megatron.layout import TensorRange, TensorSplit

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine

logger = logging.getLogger(__name__)


class SavedOptimizer:
    """The optimizer files of a checkpoint, as one rank needs them.

    `index` says where each range lies. Our files have it in the manifest; for DeepSpeed's it is built: each file is
    read by one rank (`read_part`), and all ranks join what they found (`join`).
    """

    def __init__(self, checkpoint: SavedCheckpoint, split: TensorSplit) -> None:
        self.folder, self.split, self.layout = checkpoint.folder, split, checkpoint.layout
        manifest = checkpoint.manifest
        if manifest is None:
            names = sorted(path.name for path in self.folder.iterdir() if rank_of_file(path.name) is not None)
        else:
            names = sorted(filter(OPTIMIZER_FILE.fullmatch, manifest.files))
        self.files = {name: checkpoint.entry(name) for name in names}
        self.by_ranges = any(entry is not None and entry.ranges for entry in self.files.values())
        self.written_by_us = manifest is not None
        self.index = OptimizerIndex({}, split) if manifest is None else OptimizerIndex.of(manifest, split)
        self._first: ZeroFile | None = None

    def read_part(self, rank: int, size: int) -> dict[str, ZeroFile]:
        """Describe this rank's share of DeepSpeed's files, compared with their checksums if the manifest has any.

        Not collective; CheckpointError names a file that is damaged or of another optimizer.
        """
        part: dict[str, ZeroFile] = {}
        for name in [] if self.by_ranges else list(self.files)[rank::size]:
            path, entry = self.folder / name, self.files[name]
            if entry is not None and entry.checksum is not None and (found := file_checksum(path)) != entry.checksum:
                raise CheckpointError(damage(path, found, entry.checksum))
            with FakeTensorMode():  # tensors without data, which know its offset in the file
                content = read_file(path, classes=_STAND_INS)
            part[name] = describe(path, content, _place)
        return part

    def join(self, parts: Sequence[Mapping[str, ZeroFile]]) -> None:
        """Build the index from what the ranks have read; CheckpointError if files are missing."""
        if self.by_ranges:
            return
        files = {name: file for part in parts for name, file in part.items()}
        self.index = OptimizerIndex(all_ranges(files, self.layout, self.folder), self.split)
        self._first = next(iter(files.values()))
        if (factor := self._first.gradient_factor) != 1:
            logger.info(
                f"{self.folder}: DeepSpeed added up the gradients of {factor} micro-batches; here the moments are of "
                f"their mean: divided by {factor} and {factor**2}"
            )

    def counters(self, counters: Counters) -> Counters:
        """`counters` with what GPT-NeoX's files add: fp16's loss scale, and the number of overflows."""
        if self.written_by_us or self._first is None or self._first.loss_scale is None:
            return counters
        scale = self._first.loss_scale
        overflows = scale["cur_iter"] - self._first.steps[0]
        state = LossScaleState(
            scale["cur_scale"], scale["cur_iter"], scale["last_overflow_iter"], scale["cur_hysteresis"]
        )
        return replace(counters, skipped=overflows, overflows=overflows, loss_scale=state)

    def load(self, engine: Engine, here: TensorSplit) -> None:
        """Fill the engine's optimizer, after its weights. Not collective; CheckpointError names what is wrong."""
        with StateReader(self.folder, self.index, here) as reader:
            engine.load_shards(_Ranges(reader, self.index).read)

    def random_states(self, engine: Engine) -> dict[str, Any] | None:
        """The random states that this rank saved; None if there are none. Only for the checkpoint's layout."""
        if not self.written_by_us:
            return None  # GPT-NeoX's are numpy arrays, which only running code restores; without dropout, unused
        if not self.by_ranges:
            wanted = (engine.place.dp_rank, engine.place.model_rank)
            name = next(name for name in self.files if rank_of_file(name) == wanted)
            found: dict[str, Any] | None = read_file(self.folder / name, lazy=True, classes=_STAND_INS).get("rng")
            return found
        name = optimizer_file_name(engine.place.rank)
        entry = self.files.get(name)
        if entry is None or entry.random_state is None:
            return None
        stored = entry.random_state
        with open(self.folder / name, "rb") as file:
            file.seek(stored.offset)
            data = file.read(stored.size)
        if (found_crc := crc32(data)) != stored.crc:
            raise CheckpointError(
                f"{self.folder / name} is damaged: the random states have checksum crc32:{found_crc:08x}, the manifest "
                f"says crc32:{stored.crc:08x}"
            )
        return rng_from_bytes(data)


class _Ranges:
    """Reads ranges of the index through a buffer of one block."""

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


# --- DeepSpeed's files


class _Fragment:
    """Stands in for DeepSpeed's class: `numel` and `start` in the rank's partition."""


class _Closed:
    """Stands in for the loss scaler and the ZeRO stage: attributes without a class."""

    def __init__(self, *_: Any) -> None:
        pass


_STAND_INS = (
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Closed, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Closed, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Closed, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)


def _place(value: Any) -> StoredTensor | None:
    """File location of a tensor that was read in FakeTensorMode; None if it is no contiguous tensor."""
    if not isinstance(value, Tensor) or not value.is_contiguous():
        return None
    storage = value.untyped_storage()._checkpoint_offset
    assert storage is not None  # torch.load sets it in this mode
    first = storage + int(value.storage_offset()) * value.element_size()
    return StoredTensor(first, value.numel(), dtype_name(value.dtype))
