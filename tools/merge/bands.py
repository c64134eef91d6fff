"""Bands of the merged model, which the converter's copier reads instead of files."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.common.crc import crc32

from ..convert_hf.stream.band_io import FilePool
from ..convert_hf.stream.copy import Checksums
from ..convert_hf.stream.plan import CopyJob
from ..convert_hf.stream.tensor_map import Logical, rows_and_columns
from .arithmetic import TensorPlan, Workspace, merge_tile
from .errors import MergeError
from .parents import Parent
from .report import KindSums, MergeReport, joined, kind_of, tile_sums

TILE = 1 << 16  # elements; a tile of all buffers stays in a core's cache


class MergedBands:
    """Computes bands of the merged tensors, checks that they are finite, and accumulates the sums of the report.

    `plans` is keyed by tensor name. `finish` makes the output's small files from the report and the parents' hashes.
    """

    def __init__(
        self,
        parents: Sequence[Parent],
        plans: Mapping[str, TensorPlan],
        labels: list[str],
        finish: Callable[[MergeReport, dict[str, str]], Mapping[str, bytes | Path]],
        tile: int = TILE,
    ) -> None:
        self.parents, self.plans, self.labels, self.finish, self.tile = parents, plans, labels, finish, tile
        self.report = MergeReport(labels)
        self.hashes = {p.label: h for p in parents if (h := p.manifest_hash()) is not None}
        self._summed = [i for i, p in enumerate(parents) if p.label not in self.hashes]
        self._names = sorted(parents[0].checkpoint.tensors)
        self._numbers = {name: i for i, name in enumerate(self._names)}
        self._checksums = Checksums()
        self._pool = FilePool(os.O_RDONLY)
        self._local = threading.local()

    @staticmethod
    def thread_bytes(parents: Sequence[Parent], terms: int, band: int, largest_row: int) -> int:
        """Memory in bytes of one thread, for bands of at most `band` bytes (or of one row)."""
        elements = max(TILE, largest_row)
        rank = max((p.adapter.rank for p in parents if p.adapter), default=0)
        adapters = 4 * rank * (largest_row + elements) + 8 * elements if rank else 0
        # Band sizes refer to the output's type; a parent's type may be twice as wide.
        return band * (1 + 2 * len(parents)) + Workspace.nbytes(len(parents), terms, elements) + adapters

    def read(self, job: CopyJob, band: memoryview) -> dict[str, Any]:
        """Fill `band` with merged rows. Returns the sums for the report and the checksums of the data read."""
        name = job.tensor.name
        plan = self.plans[name]
        stored, crcs = self._read_parents(name, job.start, job.stop)
        cols = rows_and_columns(job.tensor.shape)[1]
        out = torch.frombuffer(band, dtype=getattr(torch, job.tensor.dtype.name))
        work = self._workspace(len(plan.terms), cols)
        step = max(1, self.tile // cols)
        sums = KindSums()
        for start in range(job.start, job.stop, step):
            stop = min(start + step, job.stop)
            place = slice((start - job.start) * cols, (stop - job.start) * cols)
            for i, parent in enumerate(self.parents):
                parent.widen(
                    self._pool, name, start, stop, stored[i][place], work.parents[i][: place.stop - place.start]
                )
            merged = merge_tile(plan, work, start * cols, len(out[place]))
            row = tile_sums(plan, work, len(merged))
            if not row[2] < float("inf") or not all(r[0] < float("inf") for r in row[3]):
                self._blame(name, work, start, cols, len(merged))
            sums.add(row)
            _round(merged, out[place], name)
        return {"kind": kind_of(name), "sums": sums.row(), "crcs": crcs}

    def _read_parents(self, name: str, start: int, stop: int) -> tuple[list[Tensor], list[list[int]]]:
        """The parents' rows as stored, and (parent, tensor, first byte, bytes, CRC-32) of those without a manifest."""
        buffers = self._buffers([p.band_bytes(name, stop - start) for p in self.parents])
        stored, crcs = [], []
        for i, (parent, raw) in enumerate(zip(self.parents, buffers, strict=True)):
            stored.append(parent.read(self._pool, name, start, stop, raw))
            if i in self._summed:
                size = parent.band_bytes(name, stop - start)
                first = parent.band_bytes(name, start)
                crcs.append([i, self._numbers[name], first, size, crc32(raw[:size])])
        return stored, crcs

    def _buffers(self, sizes: list[int]) -> list[memoryview]:
        """One buffer per parent, reused by the thread."""
        held: list[memoryview] = self._local.__dict__.setdefault("buffers", [memoryview(bytearray()) for _ in sizes])
        for i, size in enumerate(sizes):
            if len(held[i]) < size:
                held[i] = memoryview(bytearray(size))
        return held

    def _workspace(self, terms: int, cols: int) -> Workspace:
        elements = max(self.tile, cols)
        held: tuple[int, Workspace] | None = self._local.__dict__.get("workspace")
        if held is None or held[0] < elements:
            held = (elements, Workspace(len(self.parents), terms, elements))
            self._local.workspace = held
        return held[1]

    def _blame(self, name: str, work: Workspace, start: int, cols: int, count: int) -> None:
        """Raise an error that names the parent with a non-finite value."""
        for parent, values in zip(self.parents, work.parents, strict=True):
            bad = torch.nonzero(~torch.isfinite(values[:count]))
            if len(bad):
                at = int(bad[0])
                raise MergeError(
                    f"{parent.label}: {name} holds {float(values[at])} at row {start + at // cols}, "
                    f"column {at % cols}; it is damaged, and would damage the merged model"
                )
        raise MergeError(f"{name}: the merge overflows fp32; check the weights and densities")

    def account(self, remark: Any) -> None:
        self.report.add(remark["kind"], remark["sums"])
        for parent, tensor, first, size, crc in remark["crcs"]:
            self._checksums.add((parent, tensor, first, size, crc))

    def summary(self) -> dict[str, Any]:
        """This share's sums, and the CRC-32 of every tensor that it read from each parent."""
        crcs: dict[str, dict[str, int]] = {}
        for i in self._summed:
            tensors = self.parents[i].checkpoint.tensors
            found = {n: self._checksums.whole(i, self._numbers[n], tensors[n].nbytes) for n in self._names}
            crcs[self.parents[i].label] = {n: crc for n, crc in found.items() if crc is not None}
        return {"kinds": self.report.rows(), "crcs": crcs}

    def files(self, summaries: list[Any]) -> Mapping[str, bytes | Path]:
        report = joined(self.labels, [s["kinds"] for s in summaries])
        hashes = dict(self.hashes)
        for i in self._summed:
            parent = self.parents[i]
            crcs: dict[str, int] = {}
            for summary in summaries:
                crcs |= summary["crcs"][parent.label]
            missing = sorted(set(parent.checkpoint.tensors) - set(crcs))
            if missing:
                raise AssertionError(f"{parent.label}: {missing[0]} was not read exactly once")
            hashes[parent.label] = content_hash(parent.checkpoint.tensors, crcs)
        return self.finish(report, hashes)

    def close(self) -> None:
        self._pool.close()


def content_hash(tensors: Mapping[str, Logical], crcs: Mapping[str, int]) -> str:
    """SHA-256 over name, type, shape and CRC-32 of every logical tensor: equal for equal weights in any format."""
    rows = [[name, tensors[name].dtype.name, list(tensors[name].shape), crcs[name]] for name in sorted(tensors)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _round(values: Tensor, out: Tensor, name: str) -> None:
    """Round to the output's type, to nearest even: the only rounding of a merge."""
    out.copy_(values)
    if out.dtype == torch.float16 and not bool(torch.isfinite(out).all()):
        raise MergeError(f"{name} has values that are too large for float16; choose out_dtype bfloat16 or float32")
