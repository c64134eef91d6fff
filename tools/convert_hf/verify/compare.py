"""Compare two checkpoints tensor by tensor, streamed from disk: equal bits, or how far apart the values are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron.layout import EMBEDDING, HEAD

from ..errors import ConvertError
from ..sources.checkpoint import Checkpoint, bit_equal
from ..stream.band_io import FilePool, bands, read_band
from ..stream.tensor_map import Logical, Region, rows_and_columns, whole_region

_ELEMENTS = 1 << 17  # compared at a time: the comparison needs several float64 copies
_VOCABULARY = {EMBEDDING[0].hf[0], HEAD[0].hf[0]}


@dataclass
class Difference:
    """How one tensor differs. `count` elements differ, the first at `first` (row, column)."""

    name: str
    problem: str = ""  # set if the values cannot be compared or copies disagree
    max_abs: float = 0.0
    max_rel: float = 0.0  # largest |a - b| over the largest |a|
    count: int = 0
    total: int = 0
    first: tuple[int, int] = (-1, -1)

    def text(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        where = f", first at row {self.first[0]}, column {self.first[1]}"
        return (
            f"{self.name}: {self.count:,} of {self.total:,} elements differ, max abs {self.max_abs:.3g}, "
            f"relative {self.max_rel:.3g}{where}"
        )


def compare(
    one: Checkpoint, two: Checkpoint, band: int, threads: int, progress: Callable[[int], None]
) -> list[Difference]:
    """All differences, in the model's order; empty if all tensors are equal."""
    pool = FilePool(os.O_RDONLY)
    try:
        differences = list(_replicas(pool, one)) + list(_replicas(pool, two))
        for name in [*one.tensors, *(n for n in two.tensors if n not in one.tensors)]:
            if name not in one.tensors or name not in two.tensors:
                if not _tied_head(one, two, name):
                    differences.append(Difference(name, f"only in {(one if name in one.tensors else two).root}"))
                continue
            found = _compare(pool, *_same_rows(one.tensors[name], two.tensors[name]), band, threads, progress)
            if found is not None:
                differences.append(found)
    finally:
        pool.close()
    return differences


def _replicas(pool: FilePool, checkpoint: Checkpoint) -> Iterator[Difference]:
    for tensor in checkpoint.tensors.values():
        for copy in tensor.replicas:
            other = Logical(tensor.name, tensor.shape, copy.dtype, [whole_region(copy, tensor.name)])
            if not bit_equal(pool, tensor, other, 1 << 22):
                yield Difference(tensor.name, f"not the same on all tensor-parallel ranks: {copy.path} differs")
    for first, second, message in checkpoint.duplicates:
        if not bit_equal(pool, first, second, 1 << 22):
            yield Difference(second.name, message)


def _tied_head(one: Checkpoint, two: Checkpoint, name: str) -> bool:
    """Whether `name` is a head stored only by the untied checkpoint; `duplicates` compares it if the other is tied."""
    return name == HEAD[0].hf[0] and bool(one.duplicates or two.duplicates)


def _same_rows(one: Logical, two: Logical) -> tuple[Logical, Logical]:
    """Vocabulary matrices truncated to the shorter one: a NeoX checkpoint without config.json keeps its padding."""
    if one.name not in _VOCABULARY or one.shape[1:] != two.shape[1:]:
        return one, two
    rows = min(one.shape[0], two.shape[0])
    return _cut(one, rows), _cut(two, rows)


def _cut(tensor: Logical, rows: int) -> Logical:
    if tensor.shape[0] == rows:
        return tensor
    kept = [Region(**{**vars(r), "rows": min(r.rows, rows - r.to_row)}) for r in tensor.regions if r.to_row < rows]
    return Logical(tensor.name, (rows, *tensor.shape[1:]), tensor.dtype, kept)


def _compare(
    pool: FilePool, one: Logical, two: Logical, band: int, threads: int, progress: Callable[[int], None]
) -> Difference | None:
    if one.shape != two.shape:
        return Difference(one.name, f"shapes {list(one.shape)} and {list(two.shape)}")
    rows, cols = rows_and_columns(one.shape)

    def part(limits: tuple[int, int]) -> tuple[int, Difference | None]:
        start, stop = limits
        left, right = (bytearray((stop - start) * cols * t.dtype.itemsize) for t in (one, two))
        read_band(pool, one, start, stop, memoryview(left))
        read_band(pool, two, start, stop, memoryview(right))
        if one.dtype == two.dtype and left == right:
            return len(left), None
        return len(left), _difference(one, two, left, right, start)

    total: Difference | None = None
    largest = 0.0
    with ThreadPoolExecutor(threads) as executor:
        for nbytes, found in executor.map(part, bands(one, band)):
            progress(nbytes)
            if found is None or not found.count:
                continue
            largest = max(largest, found.max_abs / found.max_rel if found.max_rel else 0.0)
            if total is None:
                total = found
                continue
            total.max_abs = max(total.max_abs, found.max_abs)
            total.count += found.count
    if total is not None:
        total.total = rows * cols
        total.max_rel = total.max_abs / largest if largest else float("inf")
    return total


def _difference(one: Logical, two: Logical, left: bytearray, right: bytearray, start: int) -> Difference:
    import torch

    a_all = torch.frombuffer(left, dtype=getattr(torch, one.dtype.name))
    b_all = torch.frombuffer(right, dtype=getattr(torch, two.dtype.name))
    result, scale = Difference(one.name), 0.0
    cols = rows_and_columns(one.shape)[1]
    for first in range(0, a_all.numel(), _ELEMENTS):
        a, b = (t[first : first + _ELEMENTS].double() for t in (a_all, b_all))
        scale = max(scale, float(a.abs().nan_to_num(0.0).max()))
        differs = (a != b) & ~(a.isnan() & b.isnan())
        count = int(differs.sum())
        if not count:
            continue
        if not result.count:
            at = first + int(differs.nonzero()[0])
            result.first = (start + at // cols, at % cols)
        result.count += count
        gap = (a - b)[differs].abs().nan_to_num(float("inf"))
        result.max_abs = max(result.max_abs, float(gap.max()))
    result.max_rel = result.max_abs / scale if scale else float("inf")
    return result


def own_digests(checkpoint: Checkpoint, progress: Callable[[int], None]) -> list[Difference]:
    """Compare every tensor and small file of a checkpoint with its own manifest."""
    from megatron.checkpoint.manifest import ManifestError, file_checksum, format_checksum, read_manifest

    from ..formats.safetensors_file import read_safetensors_header
    from ..formats.torch_file import open_torch

    try:
        manifest = read_manifest(checkpoint.root)
    except ManifestError as error:
        raise ConvertError(f"{error}; give a second checkpoint to compare with") from None
    problems = []
    pool = FilePool(os.O_RDONLY)
    try:
        for name, entry in sorted(manifest.files.items()):
            path = checkpoint.root / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                problems.append(Difference(name, f"{path} is missing or its size differs from the manifest"))
                continue
            if not entry.tensors:
                if entry.checksum is not None and file_checksum(path) != entry.checksum:
                    problems.append(Difference(name, f"{path}: checksum differs from the manifest"))
                continue
            if path.suffix == ".safetensors":
                stored = read_safetensors_header(path)
            else:
                stored = open_torch(path, inert=True).tensors()
            for tensor, expected in entry.tensors.items():
                if tensor not in stored:
                    problems.append(Difference(tensor, f"listed in the manifest, but not in {path}"))
                    continue
                crc = stored_crc(pool, path, stored[tensor].offset, stored[tensor].nbytes, progress)
                if format_checksum(crc) != expected.checksum:
                    problems.append(Difference(tensor, f"{path}: checksum differs from the manifest"))
    finally:
        pool.close()
    return problems


def stored_crc(pool: FilePool, path: Path, offset: int, nbytes: int, progress: Callable[[int], None]) -> int:
    from megatron.common.crc import crc32

    crc, end = 0, offset + nbytes
    with pool.use(path) as descriptor:
        while offset < end:
            data = os.pread(descriptor, min(1 << 22, end - offset), offset)
            if not data:
                raise ConvertError(f"{path} ended while it was read")
            crc = crc32(data, crc)
            offset += len(data)
            progress(len(data))
    return crc
