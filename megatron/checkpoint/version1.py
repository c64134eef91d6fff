"""Optimizer files of version 1, which were DeepSpeed's own: their names, and what the parameters in them are called.

A file holds a rank's flat partition of each parameter group, and for each parameter which part of the partition is its.
Which part of the parameter that is follows from the files of the data-parallel ranks before it. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron.common.errors import CheckpointError
from megatron.layout import EMBEDDING_INDEX

STATE, MASTERS, FRAGMENTS = "base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings"

_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_PARAMETER = re.compile(r"(\d+)\.(.+)")
_TIED = re.compile(r"tied_modules\.\w+\.(.+)")


def rank_of_file(name: str) -> tuple[int, int] | None:
    """(dp_rank, pp_rank * tp + tp_rank) of an optimizer file of version 1; None if it is none."""
    match = _FILE.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def tensor_of_parameter(name: str, where: str) -> tuple[int, str]:
    """(layer file, tensor) of a parameter as DeepSpeed's pipeline module names it; a tied matrix is the embedding's."""
    if match := _PARAMETER.fullmatch(name):
        return int(match[1]), match[2]
    if match := _TIED.fullmatch(name):
        return EMBEDDING_INDEX, match[1]
    raise CheckpointError(f"{where} holds a parameter {name!r}, which is of no layer")


def fragment_starts(fragments: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """The first element of each fragment in its parameter, from the fragments' sizes by data-parallel rank."""
    position: dict[str, int] = {}
    starts = []
    for sizes in fragments:
        starts.append({name: position.get(name, 0) for name in sizes})
        for name, size in sizes.items():
            position[name] = position.get(name, 0) + size
    return starts
