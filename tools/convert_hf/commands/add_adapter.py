"""`to-hf --adapter`: add an adapter to the weights of its base, W + scale B A, rounding once.

The sum is computed in float64, band by band. The error of rounding it to the output's type is reported relative to the
adapter's contribution alone, because that is what rounding can destroy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConvertError
from ..formats.dtypes import BY_NAME
from ..sources.adapters import Adapter, check_base, open_adapter
from ..sources.checkpoint import Checkpoint
from ..stream.band_io import FilePool, read_band
from ..stream.plan import CopyJob
from ..stream.publish import OutputFolder
from ..stream.tensor_map import Logical, rows_and_columns
from .convert import ConversionRequest, memory_plan, prepare_hf

REPORT = "adapter_merge.json"
_TILE = 1 << 16  # elements that each thread holds in float64 at once
_BUFFERS = 5 * 8  # bytes per element: the sum, its rounded copy, the adapter's delta and temporaries


class AddedBands:
    """Bands of the weights with the adapter added; other tensors are only converted to the output's type.

    `losses`, by tensor, is set once everything is written: |round(W + D) - (W + D)| / |D|, in 2-norms.
    """

    def __init__(self, tensors: Mapping[str, Logical], adapter: Adapter) -> None:
        self.tensors, self.adapter = tensors, adapter
        self.losses: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}
        self._pool = FilePool(os.O_RDONLY)

    def read(self, job: CopyJob, band: memoryview) -> Any:
        stored, name = self.tensors[job.tensor.name], job.tensor.name
        columns = rows_and_columns(stored.shape)[1]
        raw = bytearray((job.stop - job.start) * columns * stored.dtype.itemsize)
        read_band(self._pool, stored, job.start, job.stop, memoryview(raw))
        values = torch.frombuffer(raw, dtype=getattr(torch, stored.dtype.name)).view(-1, columns)
        out = torch.frombuffer(band, dtype=getattr(torch, job.tensor.dtype.name)).view(-1, columns)
        if name not in self.adapter.factors:
            out.copy_(values)
            self._check(name, out, values)
            return None
        step, sums = max(1, _TILE // columns), [0.0, 0.0]
        for first in range(0, job.stop - job.start, step):
            base = values[first : first + step].double()
            total = base.clone()
            rows = job.start + first
            self.adapter.add(self._pool, name, rows, rows + len(base), total)
            rounded = out[first : first + step].copy_(total)
            self._check(name, rounded, total)
            sums[0] += float((rounded.double() - total).square().sum())
            sums[1] += float((total - base).square().sum())
        return {"tensor": name, "sums": sums}

    @staticmethod
    def _check(name: str, out: torch.Tensor, values: torch.Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise ConvertError(f"{name} holds values that are not finite; the base or the adapter is damaged")
        if not bool(torch.isfinite(out).all()):
            raise ConvertError(f"{name} has values that are too large for {out.dtype}; choose bfloat16 or float32")

    def account(self, remark: Any) -> None:
        held = self._sums.setdefault(remark["tensor"], [0.0, 0.0])
        for place, value in enumerate(remark["sums"]):
            held[place] += value

    def summary(self) -> Any:
        return self._sums

    def files(self, summaries: list[Any]) -> Mapping[str, bytes | Path]:
        sums: dict[str, list[float]] = {}
        for summary in summaries:
            for name, (error, part) in summary.items():
                held = sums.setdefault(name, [0.0, 0.0])
                sums[name] = [held[0] + error, held[1] + part]
        self.losses = {
            name: math.sqrt(sums[name][0] / sums[name][1]) if sums[name][1] else 0.0 for name in sorted(sums)
        }
        report = {"rounding_over_adapter": self.losses}
        return {REPORT: (json.dumps(report, indent=1) + "\n").encode()}

    def close(self) -> None:
        self._pool.close()

    def lines(self) -> list[str]:
        """The table that the command prints."""
        if not self.losses:
            return []
        width = max(map(len, self.losses))
        lines = ["rounding error relative to the adapter's part (0: nothing lost):"]
        lines += [f"  {name.ljust(width)}  {loss:.2e}" for name, loss in self.losses.items()]
        worst = max(self.losses, key=lambda name: self.losses[name])
        return [*lines, f"largest: {self.losses[worst]:.2e} in {worst}"]


def prepare_added(
    source: Checkpoint, folder: Path, stated: str | None, shard_size: int | None, request: ConversionRequest
) -> tuple[OutputFolder, AddedBands]:
    """Plan a Hugging Face folder of a base with an adapter added; nothing is written yet.

    `stated` is the base's name as recorded in the adapter, if it differs from the name of the base's folder.
    """
    adapter = open_adapter(folder, source.tensors)
    names = {source.root.absolute().name, source.root.absolute().parent.name}
    if isinstance(made_of := source.provenance.get("source"), str):
        names.add(Path(made_of).name)
    check_base(adapter, str(source.root), names, stated, "give --adapter-base {name}")
    tensors = source.tensors
    if request.dtype is not None:
        wanted = BY_NAME[request.dtype]
        tensors = {name: Logical(name, t.shape, wanted, t.regions, t.replicas) for name, t in source.tensors.items()}
    widest = max(rows_and_columns(tensor.shape)[1] for tensor in tensors.values())
    # A thread holds its band, the base's band, one tile in float64, and A.
    own = request.threads * (max(_TILE, widest) * _BUFFERS + adapter.rank * widest * 8)
    band, threads = memory_plan(request.max_ram - own, request.threads, casting=True)
    plain = dataclasses.replace(request, dtype=None, band=band, threads=threads)
    output = prepare_hf(dataclasses.replace(source, tensors=tensors), shard_size, plain)
    bands = AddedBands(source.tensors, adapter)
    output.source = bands
    output.plan.whole = _identity(output.plan.whole, adapter)
    output.provenance |= {"adapter": _facts(adapter)}
    if request.dtype:
        output.provenance["cast_to"] = request.dtype
    return output, bands


def _facts(adapter: Adapter) -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in adapter.files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"folder": str(adapter.root), "rank": adapter.rank, "base": adapter.base_name, "sha256": digest.hexdigest()}


def _identity(whole: str, adapter: Adapter) -> str:
    """Identifies the job, including the adapter's files as they are on disk now, for --resume and --shard."""
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in adapter.files]
    return hashlib.sha256(json.dumps([whole, stamps]).encode()).hexdigest()
