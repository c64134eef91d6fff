"""The optimizer's state of a training checkpoint: where every range of it lies, in either version of the files."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint import version1
from megatron.checkpoint.discovery import OPTIMIZER_FILE
from megatron.checkpoint.manifest import file_checksum, read_manifest
from megatron.checkpoint.optimizer_files import OptimizerIndex
from megatron.checkpoint.state_ranges import STATE_KINDS, StateRange, StoredArray
from megatron.common.errors import first_problems
from megatron.layout import TensorRange, TensorSplit
from tools.convert_hf.errors import ConvertError
from tools.convert_hf.formats.pickles import TensorView
from tools.convert_hf.formats.torch_file import TorchFile, open_torch
from tools.convert_hf.sources.checkpoint import Checkpoint


@dataclass
class OptimizerSource:
    """The optimizer files of an opened checkpoint. `index` says where each range of its state lies.

    `unverified` are files without checksums of their blocks (version 1), with the checksum of each whole file.
    """

    folder: Path
    files: list[str]
    index: OptimizerIndex
    unverified: dict[str, str]

    def verify_whole_files(self) -> None:
        """Read files whose blocks have no checksums, and compare each as a whole; ConvertError if one differs."""
        for name, checksum in self.unverified.items():
            if (found := file_checksum(self.folder / name)) != checksum:
                raise ConvertError(f"{self.folder / name} has checksum {found}, the manifest says {checksum}")


def open_optimizer(checkpoint: Checkpoint) -> OptimizerSource:
    """Find the optimizer's state of a checkpoint that training wrote; ConvertError says what is missing."""
    folder, layout = checkpoint.root, checkpoint.provenance.get("layout")
    if not isinstance(layout, dict) or not {"tp", "pp", "dp"} <= layout.keys():
        raise ConvertError(
            f"{folder} has no optimizer states that are known here: its manifest names no layout (TP, PP, DP). Leave "
            "out --optimizer to write its weights alone"
        )
    manifest = read_manifest(folder)
    files = sorted(name for name in manifest.files if OPTIMIZER_FILE.fullmatch(name))
    if not files:
        raise ConvertError(
            f"{folder} has no optimizer states (converted, or removed by keep_optimizer_last_n); leave out --optimizer "
            "to write its weights alone"
        )
    split = TensorSplit(checkpoint.shape, checkpoint.tp)
    if any(manifest.files[name].ranges for name in files):
        index, unverified = OptimizerIndex.of(manifest, split), {}
    else:
        index = OptimizerIndex(_version1_ranges(folder, files, layout), split)
        unverified = {name: sum_ for name in files if (sum_ := manifest.files[name].checksum) is not None}
    if problems := index.problems():
        raise ConvertError(f"{folder} is not complete: {first_problems(problems)}")
    return OptimizerSource(folder, files, index, unverified)


def _version1_ranges(folder: Path, files: list[str], layout: Mapping[str, Any]) -> dict[str, list[StateRange]]:
    """The ranges of DeepSpeed's files: the fragments of a parameter follow one another over data-parallel ranks."""
    by_model_rank: dict[int, dict[int, str]] = defaultdict(dict)
    for name in files:
        ranks = version1.rank_of_file(name)
        if ranks is None:
            raise ConvertError(f"{folder / name} is no optimizer file that is known here")
        by_model_rank[ranks[1]][ranks[0]] = name
    result: dict[str, list[StateRange]] = {}
    for model_rank in range(layout["tp"] * layout["pp"]):
        names = by_model_rank[model_rank]
        if sorted(names) != list(range(layout["dp"])):
            raise ConvertError(
                f"{folder} lacks optimizer files of mp_rank {model_rank:02d}: {layout['dp']} are expected"
            )
        opened = [_Version1(folder / names[dp_rank]) for dp_rank in range(layout["dp"])]
        starts = version1.fragment_starts([file.sizes for file in opened])
        for dp_rank, file in enumerate(opened):
            result[names[dp_rank]] = file.ranges(model_rank % layout["tp"], starts[dp_rank])
    _drop_copies(result, layout)
    return result


def _drop_copies(found: dict[str, list[StateRange]], layout: Mapping[str, Any]) -> None:
    """Of a tied embedding, whose state the first and the last stage hold, the first stage's is taken."""
    if layout["pp"] == 1:
        return
    for name, ranges in found.items():
        ranks = version1.rank_of_file(name)
        if ranks is not None and ranks[1] // layout["tp"] == layout["pp"] - 1:
            found[name] = [part for part in ranges if part.where.layer != 0]


class _Version1:
    """One file: fragments of parameters in the flat partitions of the groups."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, open_torch(path, inert=True)
        state = self.file.value.get("optimizer_state_dict") if isinstance(self.file.value, dict) else None
        try:
            assert isinstance(state, dict)
            self.masters, self.states = state[version1.MASTERS], state[version1.STATE]["state"]
            self.fragments: dict[str, tuple[int, int, int]] = {
                name: (group, fragment.state["start"], fragment.state["numel"])
                for group, named in enumerate(state[version1.FRAGMENTS])
                for name, fragment in named.items()
            }
        except (AssertionError, KeyError, TypeError, AttributeError):
            raise ConvertError(f"{path} is not an optimizer file of version 1 as DeepSpeed 0.19.8 writes it") from None

    @property
    def sizes(self) -> dict[str, int]:
        return {name: numel for name, (_, _, numel) in self.fragments.items()}

    def ranges(self, tp_rank: int, starts: Mapping[str, int]) -> list[StateRange]:
        result = []
        for name, (group, first, numel) in self.fragments.items():
            layer, tensor = version1.tensor_of_parameter(name, str(self.path))
            state = self.states.get(group)
            if not isinstance(state, dict) or not set(STATE_KINDS[1:]) <= state.keys():
                raise ConvertError(f"{self.path} holds no moments: it was saved before the first step")
            arrays = {"master": self.masters[group], **state}
            where = TensorRange(layer, tensor, tp_rank, starts[name], starts[name] + numel)
            places = {kind: StoredArray(_offset(self.file, arrays[kind], name, first, numel)) for kind in STATE_KINDS}
            result.append(StateRange(where, _number(self.file, state["step"]), places))
        return result


def _offset(file: TorchFile, view: Any, name: str, first: int, numel: int) -> int:
    """The byte of the file at which elements `first:first + numel` of a flat fp32 tensor begin."""
    if not isinstance(view, TensorView) or view.storage.dtype.name != "float32":
        raise ConvertError(f"{file.path}: the state of {name} is not an fp32 tensor")
    stored = file.stored(name, view)
    if len(stored.shape) != 1 or first + numel > stored.shape[0]:
        raise ConvertError(f"{file.path}: the state of {name} lies outside of its partition")
    return stored.offset + 4 * first


def _number(file: TorchFile, view: Any) -> int:
    """A step count: a tensor of one fp32 number."""
    if isinstance(view, int | float):
        return int(view)
    stored = file.stored("step", view)
    with open(file.path, "rb") as data:
        data.seek(stored.offset)
        return int(struct.unpack("<f", data.read(4))[0])
