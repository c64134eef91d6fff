"""The files a conversion writes: layer files for GPT-NeoX, safetensors shards for Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.layout import LlamaShape, layer_file_name, layer_files, rank_shape

from ..errors import ConvertError
from ..formats.dtypes import DType
from ..formats.safetensors_file import file_layout
from ..formats.stored import Shape, Stored
from ..formats.torch_file import TorchLayout
from .tensor_map import Logical, Region, layout_regions, whole_region


@dataclass
class TargetTensor:
    stored: Stored  # `path` is relative to the output folder
    regions: list[Region]


@dataclass
class TargetFile:
    """A file to write: its final size, its tensors, and the other bytes, which depend on the tensors' CRCs."""

    name: str
    size: int
    tensors: list[TargetTensor]
    blocks: Callable[[dict[str, int]], list[tuple[int, bytes]]]


def neox_files(
    shape: LlamaShape, tp: int, dtype_of: Callable[[str], DType], folder: str, vocabulary: int
) -> list[TargetFile]:
    """Pipeline layer files of `shape` for `tp` ranks. `dtype_of` gives a logical tensor's type in the output.

    `vocabulary` is the source's number of rows; padding starts after `shape.vocab_size` rows.
    """
    if vocabulary != shape.vocab_size:
        raise ConvertError(f"the source has {vocabulary} vocabulary rows, {shape.vocab_size} are needed")
    result = []
    for index, layer, rows in layer_files(shape):
        for rank in range(tp):
            name = layer_file_name(index, rank)
            described: list[tuple[str, DType, Shape]] = []
            for row in rows:
                types = {dtype_of(source.format(layer=layer)) for source in row.hf}
                if len(types) > 1:
                    raise ConvertError(
                        f"{' and '.join(s.format(layer=layer) for s in row.hf)} have different types "
                        f"({', '.join(sorted(t.name for t in types))}) but share a tensor in GPT-NeoX; give --dtype"
                    )
                described.append((row.neox, types.pop(), rank_shape(row, shape, tp)))
            layout = TorchLayout(name.removesuffix(".pt"), described)
            path = Path(folder, name)
            tensors = []
            for row, (neox, dtype, local) in zip(rows, described, strict=True):
                stored = Stored(path, neox, layout.offsets[neox], dtype, local)
                tensors.append(TargetTensor(stored, list(layout_regions(row, layer, shape, tp, rank, stored))))
            result.append(TargetFile(str(path), layout.size, tensors, layout.blocks))
    return result


def hf_files(
    tensors: Mapping[str, Logical], dtype_of: Callable[[str], DType], shards: list[list[str]]
) -> list[TargetFile]:
    """Safetensors files that hold the logical tensors, one file for each list of names in `shards`."""
    result = []
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        described = [(n, dtype_of(n), tensors[n].shape) for n in names]
        header, offsets, size = file_layout(described)
        members = []
        for name, dtype, shape in described:
            stored = Stored(Path(file), name, offsets[name], dtype, shape)
            members.append(TargetTensor(stored, [whole_region(stored, name)]))
        result.append(TargetFile(file, size, members, _just(header)))
    return result


def _just(header: bytes) -> Callable[[dict[str, int]], list[tuple[int, bytes]]]:
    return lambda crcs: [(0, header)]


def shards_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensor names in order, split into shards of at most `limit` bytes (a larger tensor gets its own shard)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes.items():
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def shards_like(weight_map: Mapping[str, str], names: list[str]) -> list[list[str]] | None:
    """The shards of an existing index, or None if it cannot be reused: other tensors, or unusual file names."""
    files = sorted(set(weight_map.values()))
    expected = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if set(weight_map) != set(names) or files != expected or len(files) == 1:
        return None
    return [[n for n in names if weight_map[n] == file] for file in files]
