"""Loads a stage's weights from layer files of another tensor-parallel size, resharded by the layout table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.checkpoint.layer_files import layer_tensors
from megatron.checkpoint.manifest import FileEntry
from megatron.checkpoint.torch_files import dtype_name, read_tensors, tensor_entry
from megatron.common.errors import CheckpointError
from megatron.layout import TensorSplit, Transfer, layer_file_name, row_of, transfers

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine


@torch.no_grad()
def load_resharded_layers(
    engine: Engine, folder: Path, here: TensorSplit, there: TensorSplit, files: Mapping[str, FileEntry]
) -> set[tuple[str, str]]:
    """Fill this rank's stage, sharded as `here`, from layer files in `folder` that are sharded as `there`.

    The files have been checked against the model (`verify_before_load`). Each tensor is compared with its checksum in
    `files`, the manifest's, before any of it is used. Vocabulary padding that the files do not have becomes zero.
    Returns the conversions done, as (dtype in the file, dtype of the parameter). Not collective.
    """
    conversions = set()
    for index, layer in [*engine.numbered_layers(), *engine.tied_copies()]:
        shards = _Shards(folder, index, files)
        for name, parameter in layer_tensors(layer).items():
            row, flat = row_of(index, name, here.shape), parameter.detach().view(-1)
            parts = list(transfers(row, here, engine.place.tp_rank, 0, flat.numel(), there))
            if sum(part.length * part.count for part in parts) < flat.numel():
                flat.zero_()
            for part in parts:
                stored = shards.tensor(name, part.tp_rank)
                _copy(part, stored, flat)
                conversions.add((dtype_name(stored.dtype), dtype_name(parameter.dtype)))
    return conversions


class _Shards:
    """The tensors of a layer in the files of the tensor-parallel ranks that saved it; each is verified once."""

    def __init__(self, folder: Path, index: int, files: Mapping[str, FileEntry]) -> None:
        self.folder, self.index, self.files = folder, index, files
        self._stored: dict[int, dict[str, Tensor]] = {}
        self._verified: set[tuple[str, int]] = set()

    def tensor(self, name: str, tp_rank: int) -> Tensor:
        file = layer_file_name(self.index, tp_rank)
        if tp_rank not in self._stored:
            self._stored[tp_rank] = read_tensors(self.folder / file)
        tensor = self._stored[tp_rank][name]
        listed = self.files[file].tensors.get(name) if file in self.files else None
        if listed is not None and (name, tp_rank) not in self._verified:
            found = tensor_entry(tensor)
            if found != listed:
                raise CheckpointError(
                    f"{self.folder / file} is damaged: {name} has checksum {found.checksum}, the manifest says "
                    f"{listed.checksum}"
                )
            self._verified.add((name, tp_rank))
        return tensor


def _copy(transfer: Transfer, source: Tensor, target: Tensor) -> None:
    shape = (transfer.count, transfer.length)
    flat = source.reshape(-1)
    first = flat.storage_offset() + transfer.source
    torch.as_strided(target, shape, (transfer.target_pitch, 1), target.storage_offset() + transfer.target).copy_(
        torch.as_strided(flat, shape, (transfer.source_pitch, 1), first)
    )
