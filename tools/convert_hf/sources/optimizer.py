"""The optimizer state of a training checkpoint: the location of every range, in our files or in DeepSpeed's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.discovery import OPTIMIZER_FILE
from megatron.checkpoint.manifest import MANIFEST_NAME, file_checksum, read_manifest
from megatron.checkpoint.optimizer_files import OptimizerIndex
from megatron.checkpoint.zero_files import StoredTensor, ZeroFile, all_ranges, describe
from megatron.common.errors import first_problems
from megatron.layout import TensorSplit

from ..errors import ConvertError
from ..formats.pickles import TensorView
from ..formats.torch_file import open_torch
from .checkpoint import Checkpoint


@dataclass
class OptimizerSource:
    """The optimizer files of an opened checkpoint. `index` locates each range of its state.

    `unverified` lists files without block checksums (version 1), with the checksum of each whole file.
    """

    folder: Path
    files: list[str]
    index: OptimizerIndex
    unverified: dict[str, str]

    def verify_whole_files(self) -> None:
        """Verify files without block checksums as a whole; ConvertError if one differs."""
        for name, checksum in self.unverified.items():
            if (found := file_checksum(self.folder / name)) != checksum:
                raise ConvertError(f"{self.folder / name} has checksum {found}, the manifest says {checksum}")


def open_optimizer(checkpoint: Checkpoint) -> OptimizerSource:
    """Find the optimizer state of a training checkpoint; ConvertError states what is missing."""
    folder = checkpoint.root
    if not (folder / MANIFEST_NAME).exists():
        raise ConvertError(
            f"{folder} has no manifest: it was written by GPT-NeoX, whose optimizer states are not rewritten. A run "
            f"resumes from them at any layout with --load {folder.parent} --data_order gpt-neox; leave out "
            f"--optimizer to write the weights alone"
        )
    manifest, layout = read_manifest(folder), checkpoint.provenance.get("layout")
    files = sorted(filter(OPTIMIZER_FILE.fullmatch, manifest.files))
    if not files or not isinstance(layout, dict) or not {"tp", "pp", "dp"} <= layout.keys():
        raise ConvertError(
            f"{folder} has no optimizer states (it was converted, or keep_optimizer_last_n removed them); leave out "
            "--optimizer to write its weights alone"
        )
    split = TensorSplit(checkpoint.shape, checkpoint.tp)
    unverified: dict[str, str] = {}
    if any(manifest.files[name].ranges for name in files):
        index = OptimizerIndex.of(manifest, split)
    else:
        found = {name: _zero_file(folder / name) for name in files}
        index = OptimizerIndex(all_ranges(found, layout, folder), split)
        unverified = {name: checksum for name in files if (checksum := manifest.files[name].checksum) is not None}
    if problems := index.problems():
        raise ConvertError(f"{folder} is not complete: {first_problems(problems)}")
    return OptimizerSource(folder, files, index, unverified)


def _zero_file(path: Path) -> ZeroFile:
    file = open_torch(path, inert=True)

    def place(value: Any) -> StoredTensor | None:
        if not isinstance(value, TensorView):
            return None
        stored = file.stored("its state", value)
        return StoredTensor(stored.offset, math.prod(stored.shape), stored.dtype.name)

    return describe(path, file.value, place, lambda object_: object_.state)
