"""Turn two sets of regions into copy jobs: which bands of which logical tensors go where. No file is read here.

A job reads a band of one logical tensor once and writes it wherever it is needed, so each byte is read once and written
once for any packing of source and target.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConvertError
from .band_io import bands
from .targets import TargetFile
from .tensor_map import Logical, Region, rows_and_columns


@dataclass(frozen=True)
class Destination:
    """A region of a target tensor: file number, tensor number within the file, and the region."""

    file: int
    tensor: int
    region: Region


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Rows `start:stop` of a logical tensor, read once and written to all their destinations."""

    tensor: Logical
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * rows_and_columns(self.tensor.shape)[1] * self.tensor.dtype.itemsize


@dataclass
class CopyPlan:
    """A whole conversion. `destinations` is keyed by logical tensor; `band` is the size of a band in bytes."""

    sources: dict[str, Logical]
    files: list[TargetFile]
    destinations: dict[str, list[Destination]]
    jobs: list[CopyJob]
    band: int
    whole: str = ""  # identifies the complete job of all shares

    @property
    def bytes_read(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def bytes_written(self) -> int:
        return sum(file.size for file in self.files)

    def digest(self) -> str:
        """Identifies the exact job: sources as they are on disk now, targets, band size."""
        bands = [(job.tensor.name, job.start, job.stop) for job in self.jobs]
        return _digest([self.whole, [file.name for file in self.files], bands])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _identify(sources: Iterable[Logical], files: list[TargetFile]) -> str:
    stamps = [_stamp(path) for path in sorted({r.stored.path for t in sources for r in t.regions})]
    return _digest([stamps, [(f.name, f.size, [(t.stored.name, t.stored.offset) for t in f.tensors]) for f in files]])


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def plan_copies(
    sources: Mapping[str, Logical], files: list[TargetFile], band: int, shard: tuple[int, int] = (1, 1)
) -> CopyPlan:
    """Plan all files, or share `shard` (i, n) of them. Shares have about equal bytes and no file in common."""
    destinations: dict[str, list[Destination]] = defaultdict(list)
    whole = _identify(sources.values(), files)
    files = _share(files, shard)
    for f, file in enumerate(files):
        for t, target in enumerate(file.tensors):
            _check_target(file.name, target.regions)
            for region in target.regions:
                if region.logical is None:
                    continue
                if region.logical not in sources:
                    raise ConvertError(f"the source holds no {region.logical}, which {file.name} needs")
                destinations[region.logical].append(Destination(f, t, region))
    needed = {name: sources[name] for name in sources if name in destinations}
    order = sorted(needed.values(), key=lambda t: (str(t.regions[0].stored.path), t.regions[0].stored.offset))
    jobs = [CopyJob(tensor, *rows) for tensor in order for rows in bands(tensor, band)]
    return CopyPlan(needed, files, dict(destinations), jobs, band, whole)


def _check_target(name: str, regions: list[Region]) -> None:
    """Check that targets are written as contiguous ranges that cover each tensor once."""
    position = 0
    for region in regions:
        _, cols = rows_and_columns(region.stored.shape)
        if region.row != position or region.cols != cols or region.col or region.step != 1:
            raise AssertionError(f"{name}: {region.stored.name} is not a sequence of whole rows")
        position += region.rows
    if regions and position != rows_and_columns(regions[0].stored.shape)[0]:
        raise AssertionError(f"{name}: {regions[0].stored.name} is not covered")


def _share(files: list[TargetFile], shard: tuple[int, int]) -> list[TargetFile]:
    """Files of share i of n. Files that need the same logical tensors stay together, so that nothing is read twice."""
    number, count = shard
    if count == 1:
        return files
    groups: list[tuple[set[str], list[TargetFile]]] = []
    by_tensor: dict[str, int] = {}
    for file in files:
        names = {r.logical for t in file.tensors for r in t.regions if r.logical}
        at = next((by_tensor[n] for n in sorted(names) if n in by_tensor), len(groups))
        if at == len(groups):
            groups.append((set(), []))
        groups[at][0].update(names)
        groups[at][1].append(file)
        by_tensor.update(dict.fromkeys(names, at))
    loads = [0] * count
    result = []
    for _, members in sorted(groups, key=lambda g: (-sum(f.size for f in g[1]), g[1][0].name)):
        least = loads.index(min(loads))
        loads[least] += sum(f.size for f in members)
        if least == number - 1:
            result += members
    return sorted(result, key=lambda f: f.name)
