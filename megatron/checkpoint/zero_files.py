"""Optimizer files as DeepSpeed writes them under ZeRO-1: GPT-NeoX's, and ours of version 1. Standard library only.

A file holds a rank's flat partition of each parameter group, and which part of the partition belongs to each parameter.
Which part of the parameter that is follows from the files of the data-parallel ranks before it. The files have no block
checksums, so neither do the ranges.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.state_ranges import ITEM, STATE_KINDS, StateRange, StoredArray
from megatron.common.errors import CheckpointError
from megatron.layout import EMBEDDING_INDEX, TensorRange

_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_PARAMETER = re.compile(r"(\d+)\.(.+)")
_TIED = re.compile(r"tied_modules\.\w+\.(.+)")


@dataclass(frozen=True)
class StoredTensor:
    """Where the elements of a contiguous tensor lie in its file: first byte, number of elements, dtype's name."""

    offset: int
    numel: int
    dtype: str


@dataclass(frozen=True)
class ZeroFile:
    """What one file holds.

    `fragments` is (group, first element in the group's partition, number of elements) by parameter; `arrays` is the
    first byte of each array of a group by its kind; `steps` are the updates that a group has seen. Its gradients were
    `gradient_factor` times the mean over the batch. `loss_scale` are the values of fp16's dynamic loss scale.
    """

    fragments: Mapping[str, tuple[int, int, int]]
    arrays: Sequence[Mapping[str, int]]
    steps: Sequence[int]
    gradient_factor: int = 1
    loss_scale: Mapping[str, Any] | None = None

    def ranges(self, tp_rank: int, starts: Mapping[str, int], where: str) -> list[StateRange]:
        """The file's ranges; `starts` is the first element of each parameter that it holds, `where` its name."""
        factors = dict(zip(STATE_KINDS, (1, 1 / self.gradient_factor, 1 / self.gradient_factor**2), strict=True))
        result = []
        for name, (group, first, numel) in self.fragments.items():
            layer, tensor = tensor_of_parameter(name, where)
            arrays = {
                kind: StoredArray(self.arrays[group][kind] + ITEM * first, factor=factor)
                for kind, factor in factors.items()
            }
            place = TensorRange(layer, tensor, tp_rank, starts[name], starts[name] + numel)
            result.append(StateRange(place, self.steps[group], arrays))
        return result


def rank_of_file(name: str) -> tuple[int, int] | None:
    """(dp_rank, pp_rank * tp + tp_rank) of such an optimizer file; None for any other name."""
    match = _FILE.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def tensor_of_parameter(name: str, where: str) -> tuple[int, str]:
    """(layer file, tensor) of a parameter as DeepSpeed's pipeline module names it; a tied matrix is the embedding's."""
    if match := _PARAMETER.fullmatch(name):
        return int(match[1]), match[2]
    if match := _TIED.fullmatch(name):
        return EMBEDDING_INDEX, match[1]
    raise CheckpointError(f"{where} holds a parameter {name!r}, which belongs to no layer")


def describe(
    path: Path,
    content: Any,
    place: Callable[[Any], StoredTensor | None],
    attributes: Callable[[Any], Mapping[str, Any]] = vars,
) -> ZeroFile:
    """Describe a file from its unpickled `content`; `place` turns a tensor in it into its location.

    `attributes` gives the attributes of a DeepSpeed object. CheckpointError unless it is the state of an Adam under
    ZeRO-1.
    """
    try:
        state = content["optimizer_state_dict"]
        masters = state["single_partition_of_fp32_groups"]
        base = state["base_optimizer_state"]
        moments, groups = base["state"], base["param_groups"]
        fragments = {}
        for group, named in enumerate(state["param_slice_mappings"]):
            for name, address in named.items():
                fragment = attributes(address)
                fragments[name] = group, int(fragment["start"]), int(fragment["numel"])
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} is not an optimizer file of ZeRO stage 1 as DeepSpeed 0.10 and later write it"
        ) from None
    arrays, steps = [], []
    for group, master in enumerate(masters):
        stored = {"master": master, **moments.get(group, {})}
        if lacking := [kind for kind in STATE_KINDS if kind not in stored]:
            raise CheckpointError(
                f"{path} holds no {', '.join(lacking)}: it was saved before the first step, or by an optimizer other "
                f"than Adam; start from its weights with --finetune true, or keep its position with --no_load_optim "
                f"true"
            )
        longest = max((first + numel for of, first, numel in fragments.values() if of == group), default=0)
        arrays.append({kind: _offset(path, kind, place(stored[kind]), longest) for kind in STATE_KINDS})
        # torch counts for each parameter, apex for each group.
        steps.append(_count(path, stored.get("step", groups[group].get("step")), place))
    scaler = attributes(state["loss_scaler"]) if state.get("dynamic_loss_scale") else None
    return ZeroFile(fragments, arrays, steps, _gradient_factor(content), scaler)


def _gradient_factor(content: Mapping[str, Any]) -> int:
    """The factor between the gradients that the moments were made of and the mean over the batch.

    DeepSpeed 0.16.0 to 0.18.2 divide by the number of micro-batches only where the engine itself reduces gradients,
    which their pipeline engine does not let it do (deepspeed/runtime/engine.py, `do_gradient_reduction`): the gradients
    of the micro-batches are added up. Adam's steps hardly show it.
    """
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(content.get("ds_version")))
    if match is None or not (0, 16, 0) <= tuple(map(int, match.groups())) <= (0, 18, 2):
        return 1
    return int((content.get("ds_config") or {}).get("gradient_accumulation_steps") or 1)


def all_ranges(files: Mapping[str, ZeroFile], layout: Mapping[str, int], folder: Path) -> dict[str, list[StateRange]]:
    """The ranges of each file; CheckpointError if files of a rank of `layout` (tp, pp, dp) are missing.

    The fragments of a parameter follow one another over the data-parallel ranks. Of a tied embedding, whose state both
    the first and the last stage hold, the first stage's is used.
    """
    by_rank = {rank_of_file(name): name for name in files}
    result: dict[str, list[StateRange]] = {}
    for model_rank in range(layout["tp"] * layout["pp"]):
        names = [by_rank.get((dp_rank, model_rank)) for dp_rank in range(layout["dp"])]
        if None in names:
            raise CheckpointError(
                f"{folder} lacks the optimizer file of dp_rank {names.index(None)}, mp_rank {model_rank:02d}: "
                f"{layout['dp']} files of each mp_rank are expected"
            )
        pp_rank, tp_rank = divmod(model_rank, layout["tp"])
        copies_embedding = pp_rank > 0 and pp_rank == layout["pp"] - 1
        position: dict[str, int] = {}
        for name in filter(None, names):
            starts = {parameter: position.get(parameter, 0) for parameter in files[name].fragments}
            ranges = files[name].ranges(tp_rank, starts, str(folder / name))
            result[name] = [part for part in ranges if not (copies_embedding and part.where.layer == EMBEDDING_INDEX)]
            for parameter, (_, _, numel) in files[name].fragments.items():
                position[parameter] = starts[parameter] + numel
    return result


def _offset(path: Path, kind: str, stored: StoredTensor | None, needed: int) -> int:
    if stored is None or stored.dtype != "float32":
        raise CheckpointError(f"{path}: its {kind} is {'no tensor' if stored is None else stored.dtype}, not float32")
    if stored.numel < needed:
        raise CheckpointError(f"{path}: its {kind} has {stored.numel} elements, its parameters take {needed}")
    return stored.offset


def _count(path: Path, value: Any, place: Callable[[Any], StoredTensor | None]) -> int:
    """A number of updates: a plain number, or a tensor of one."""
    if isinstance(value, int | float):
        return int(value)
    stored = None if value is None else place(value)
    form = {"float32": "<f", "int32": "<i", "int64": "<q"}.get("" if stored is None else stored.dtype)
    if stored is None or form is None:
        raise CheckpointError(f"{path} does not say how many updates its state has seen")
    with open(path, "rb") as file:
        file.seek(stored.offset)
        return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])
