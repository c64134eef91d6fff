"""Repeat a merge without writing it: recompute every tensor and compare it with a folder, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..convert_hf.sources.opening import open_checkpoint
from ..convert_hf.stream.band_io import FilePool, bands, read_band
from ..convert_hf.stream.plan import CopyJob
from ..convert_hf.stream.tensor_map import Logical
from .errors import MergeError
from .job import MergeJob

_SHOWN = 12


@dataclass
class TensorDifference:
    """How a stored tensor differs from the recomputed one."""

    count: int = 0
    largest: float = 0.0
    first: int = -1  # element


def verify_merge(job: MergeJob, folder: Path, progress: Callable[[int], None]) -> list[str]:
    """Lines that report differences; empty if every tensor of `folder` matches the recipe."""
    stored = open_checkpoint(folder)
    names = sorted(job.merged.tensors)
    for name in sorted(set(names) ^ set(stored.tensors)):
        raise MergeError(f"{folder}: {name} is {'missing' if name in names else 'not in the merged model'}")
    for name in names:
        ours, theirs = job.merged.tensors[name], stored.tensors[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise MergeError(
                f"{folder}: {name} is {list(theirs.shape)} {theirs.dtype.name}, the recipe gives {list(ours.shape)} "
                f"{ours.dtype.name}"
            )
    source = job.bands(names, progress)
    pool = FilePool(os.O_RDONLY)
    jobs = [CopyJob(job.merged.tensors[n], *rows) for n in names for rows in bands(job.merged.tensors[n], job.band)]

    def compare(one: CopyJob) -> tuple[CopyJob, TensorDifference]:
        return one, _compare(source.read, pool, stored.tensors[one.tensor.name], one)

    found: dict[str, TensorDifference] = {}
    try:
        with ThreadPoolExecutor(job.threads) as executor:
            for one, difference in executor.map(compare, jobs):
                progress(one.nbytes)
                if difference.count:
                    _join(found.setdefault(one.tensor.name, TensorDifference()), difference)
    finally:
        source.close()
        pool.close()
    lines = [
        f"{name}: {d.count:,} elements differ, the first is element {d.first}, max abs {d.largest:.3g}"
        for name, d in found.items()
    ]
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"... and {more} more tensors differ"] if more > 0 else lines


def _compare(
    merged: Callable[[CopyJob, memoryview], object], pool: FilePool, tensor: Logical, job: CopyJob
) -> TensorDifference:
    ours, theirs = bytearray(job.nbytes), bytearray(job.nbytes)
    merged(job, memoryview(ours))
    read_band(pool, tensor, job.start, job.stop, memoryview(theirs))
    if ours == theirs:
        return TensorDifference()
    dtype = getattr(torch, tensor.dtype.name)
    a, b = torch.frombuffer(ours, dtype=dtype), torch.frombuffer(theirs, dtype=dtype)
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    different = torch.nonzero(a.view(bits) != b.view(bits)).flatten()
    gap = (a[different].double() - b[different].double()).abs().nan_to_num(float("inf"))
    first = job.start * (tensor.nbytes // tensor.dtype.itemsize // tensor.shape[0]) + int(different[0])
    return TensorDifference(len(different), float(gap.max()), first)


def _join(total: TensorDifference, other: TensorDifference) -> None:
    total.first = other.first if total.first < 0 else total.first
    total.count += other.count
    total.largest = max(total.largest, other.largest)
