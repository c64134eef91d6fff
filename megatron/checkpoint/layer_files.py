"""Layer files of a pipeline stage: the tensors to write, checks before anything is loaded, strict loading.

DeepSpeed's own loader globs for files and gives a rank another rank's shard when its own is missing; nothing here
searches for files: `megatron.layout` says which must exist, and each rank opens those with its own name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from megatron.checkpoint.layer_set import expected_files, set_problems
from megatron.checkpoint.manifest import FileEntry
from megatron.checkpoint.torch_files import Header, dtype_name, read_headers, read_tensors
from megatron.checkpoint.verified import verified_tensors
from megatron.common.errors import CheckpointError, one_line
from megatron.layout import LlamaShape, TensorRow, is_factor, layer_file_name, rank_shape

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")


class _Described(Protocol):
    """What both files and manifests record of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


def own_layers(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """The live tensors of the layer files that this rank writes, by file.

    Data-parallel ranks hold equal weights and take the layers of their stage in turn.
    """
    place = engine.place
    return {
        layer_file_name(index, place.tp_rank): layer_tensors(layer)
        for turn, (index, layer) in enumerate(engine.numbered_layers())
        if turn % place.dp == place.dp_rank
    }


@torch.no_grad()
def load_layers(engine: Engine, folder: Path, entries: Mapping[str, FileEntry] | None = None) -> set[tuple[str, str]]:
    """Fill this rank's stage from the layer files in `folder`; every tensor must be there, with its shape.

    Returns the conversions done, as (dtype in the file, dtype of the parameter). Copies in place; not collective. With
    the `entries` of a manifest, what is read is compared with its checksums. CheckpointError names the file and the
    tensor.
    """
    conversions = set()
    for index, layer in [*engine.numbered_layers(), *engine.tied_copies()]:
        path = folder / layer_file_name(index, engine.place.tp_rank)
        stored, wanted = read_tensors(path), layer_tensors(layer)
        problems = list(_key_problems(stored.keys(), wanted.keys()))
        problems += [
            _shape_problem(name, tuple(stored[name].shape), tuple(parameter.shape))
            for name, parameter in wanted.items()
            if name in stored and stored[name].shape != parameter.shape
        ]
        if problems:
            raise CheckpointError(f"{path}: {'; '.join(problems)}")
        with verified_tensors(path, None if entries is None else entries.get(path.name), stored):
            for name, parameter in wanted.items():
                parameter.detach().copy_(stored[name])
        for name, parameter in wanted.items():
            conversions.add((dtype_name(stored[name].dtype), dtype_name(parameter.dtype)))
    return conversions


def layer_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's state without adapters and megatron-core's `_extra_state` entries, which GPT-NeoX refuses."""
    state = layer.state_dict()
    return {name: state[name] for name in state if not (name.endswith("_extra_state") or is_factor(name))}


def tensor_problems(
    stored: Mapping[str, _Described], rows: tuple[TensorRow, ...], shape: LlamaShape, tp: int
) -> list[str]:
    """Names, shapes and dtypes of one layer file's tensors that do not fit `rows`; empty if all do."""
    wanted = {row.neox: rank_shape(row, shape, tp) for row in rows}
    problems = list(_key_problems(stored.keys(), wanted.keys()))
    for name in sorted(stored.keys() & wanted.keys()):
        header = stored[name]
        if header.shape != wanted[name]:
            problems.append(_shape_problem(name, header.shape, wanted[name]))
        if header.dtype not in WEIGHT_DTYPES:
            problems.append(f"{name} has dtype {header.dtype}, expected one of {', '.join(WEIGHT_DTYPES)}")
    return problems


def verify_before_load(
    folder: Path,
    shape: LlamaShape,
    tp: int,
    part: tuple[int, int] = (0, 1),
    manifest_files: Mapping[str, FileEntry] | None = None,
) -> list[str]:
    """Problems of a checkpoint's layer files against the model's shape, from their headers; no weight is read.

    Every file of every tp_rank is checked, whichever rank will load it: the ranks of a run divide the files among them,
    and `part` is (rank, ranks). With the files of a manifest, headers must also agree with it. Empty if all is well.
    """
    rank, ranks = part
    names = {path.name for path in folder.iterdir()}
    problems = set_problems(names, shape, tp) if rank == 0 else []
    for name, rows in sorted(expected_files(shape, tp).items())[rank::ranks]:
        if name not in names:
            continue  # named by rank 0 already
        try:
            headers = read_headers(folder / name)
        except (CheckpointError, OSError) as error:
            problems.append(one_line(error))
            continue
        found = tensor_problems(headers, rows, shape, tp)
        if not found and manifest_files is not None:
            found = _manifest_problems(headers, manifest_files.get(name))
        problems += [f"{folder / name}: {problem}" for problem in found]
    return problems


def _manifest_problems(headers: Mapping[str, Header], entry: FileEntry | None) -> list[str]:
    if entry is None:
        return ["is not listed in the manifest"]
    listed = {name: Header(tensor.shape, tensor.dtype) for name, tensor in entry.tensors.items()}
    return [
        f"{name} is {headers.get(name)} in the file and {listed.get(name)} in the manifest"
        for name in sorted(listed.keys() | headers.keys())
        if listed.get(name) != headers.get(name)
    ]


def _key_problems(stored: Any, wanted: Any) -> Iterator[str]:
    for name in sorted(wanted - stored):
        yield f"{name} is missing"
    for name in sorted(stored - wanted):
        yield f"{name} is not a tensor of this layer"


def _shape_problem(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"{name} has shape {list(stored)}, the model's is {list(wanted)}"
