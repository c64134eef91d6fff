"""Write the optimizer state of one layout as the files of another, with one job per block of the output.

A job reads its block's elements from the blocks of the source that hold them, verifying each, and writes its block in
one piece. Jobs follow the order of the source, so that a block that several of them need is read once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint.manifest import format_checksum
from megatron.checkpoint.optimizer_files import FilePlan, OptimizerIndex, optimizer_file_name, plan_file
from megatron.checkpoint.optimizer_reader import StateReader
from megatron.checkpoint.state_ranges import ITEM, block_bytes, blocks_of
from megatron.common.crc import combine, crc32
from megatron.layout import TensorRange, TensorRow, TensorSplit, layer_files, row_of, transfers
from megatron.planner.cost.parallel_layout import decoders_by_stage

from ..errors import ConvertError
from .copy import CopyJournal, JobRunner, Piece, preallocate


@dataclass(frozen=True)
class BlockJob:
    """A block of the output: part `where` of array `array` of file `file`; `offset` is its first byte in the file."""

    file: int
    array: int
    block: int
    where: TensorRange
    kind: str
    offset: int

    @property
    def nbytes(self) -> int:
        return len(self.where) * ITEM


class StateCopy:
    """The optimizer files of a layout, to be written from the files that `index` locates in `source`.

    `files` names the files of the source; with `shard` (i, n) only a share of the output's files is written.
    `verify_first` verifies the files without block checksums.
    """

    def __init__(
        self,
        source: Path,
        files: Sequence[str],
        index: OptimizerIndex,
        split: TensorSplit,
        pp: int,
        dp: int,
        *,
        threads: int,
        cached_blocks: int,
        shard: tuple[int, int] = (1, 1),
        verify_first: Callable[[], None] = lambda: None,
    ) -> None:
        self.source, self.source_files, self.index, self.split = source, files, index, split
        self.pp, self.dp = pp, dp
        self.threads, self.cached_blocks, self.verify_first = threads, cached_blocks, verify_first
        self.bytes_read = 0
        by_rank = rank_ranges(split, pp, dp)
        self.all = {optimizer_file_name(rank): plan_file(ranges) for rank, ranges in by_rank.items() if ranges}
        self.names = sorted(self.all)[shard[0] - 1 :: shard[1]]
        self.plans: list[FilePlan] = [self.all[name] for name in self.names]

    @property
    def bytes_written(self) -> int:
        return sum(plan.size for plan in self.plans)

    @cached_property
    def jobs(self) -> list[BlockJob]:
        size = block_bytes() // ITEM
        jobs = []
        for f, plan in enumerate(self.plans):
            for a, (where, kind, offset) in enumerate(plan.arrays):
                for block, start in enumerate(range(where.start, where.stop, size)):
                    part = replace(where, start=start, stop=min(start + size, where.stop))
                    jobs.append(BlockJob(f, a, block, part, kind, offset + block * block_bytes()))
        return sorted(jobs, key=self._position)

    def _position(self, job: BlockJob) -> tuple[Any, ...]:
        """Position of a job's first element in the source."""
        where = job.where
        row = row_of(where.layer, where.tensor, self.split.shape)
        first = next(transfers(row, self.split, where.tp_rank, where.start, where.stop, self.index.split), None)
        if first is None:  # padding only
            return where.layer, where.tensor, job.kind, 0, 0, where.tp_rank
        # Row by row over all ranks if columns are split, rank after rank if rows are.
        place = (first.source, first.tp_rank) if row.shard_dim == 1 else (first.tp_rank, first.source)
        return where.layer, where.tensor, job.kind, *place, where.tp_rank

    @cached_property
    def whole(self) -> str:
        """Identifies the job of all shares: the source's files in their current state, and the output's files."""
        stamps = [[name, *_stamp(self.source / name)] for name in self.source_files]
        outputs = [[name, plan.size, [str(array) for array in plan.arrays]] for name, plan in sorted(self.all.items())]
        return hashlib.sha256(json.dumps([stamps, outputs, block_bytes()]).encode()).hexdigest()

    def write(
        self, folder: Path, journal_path: Path, resume: bool, progress: Callable[[int], None]
    ) -> dict[str, dict[str, Any]]:
        """Write the files into `folder` and return their manifest entries by name. `resume` continues a journal."""
        self.verify_first()
        folder.mkdir(parents=True, exist_ok=True)
        resume = resume and journal_path.exists()
        paths = [folder / name for name in self.names]
        digest = hashlib.sha256(json.dumps([self.whole, self.names]).encode()).hexdigest()
        journal = CopyJournal(journal_path, digest, resume)
        try:
            for path, plan in zip(paths, self.plans, strict=True):
                preallocate(path, plan.size, keep=resume)
            progress(sum(self.jobs[number].nbytes for number in journal.finished))
            with StateReader(self.source, self.index, self.split, self.cached_blocks) as reader:
                _BlockWriter(self.jobs, paths, self.threads, reader).run(journal, progress)
                self.bytes_read = reader.bytes_read
        finally:
            journal.close()
        return {
            path.name: self._finish(f, path, plan, journal)
            for f, (path, plan) in enumerate(zip(paths, self.plans, strict=True))
        }

    def _finish(self, number: int, path: Path, plan: FilePlan, journal: CopyJournal) -> dict[str, Any]:
        """Write the header, sync, and assemble the file's manifest entry from the checksums of its blocks."""
        with open(path, "r+b") as file:
            file.write(plan.header)
            file.flush()
            os.fsync(file.fileno())
        crc = crc32(plan.header)
        checksums: dict[tuple[TensorRange, str], list[int]] = {}
        for a, (where, kind, _) in enumerate(plan.arrays):
            sums = checksums[where, kind] = []
            for block in range(blocks_of(len(where))):
                nbytes = min(block_bytes(), len(where) * ITEM - block * block_bytes())
                found = journal.checksums.whole(number, _block_key(a, block), nbytes)
                if found is None:
                    raise AssertionError(f"{path}: block {block} of {kind} of {where} was not written exactly once")
                sums.append(found)
                crc = combine(crc, found, nbytes)
        steps = {where: self.index.step(where.layer, where.tensor) for where, _, _ in plan.arrays}
        ranges = [part.to_json() for part in plan.index(steps, checksums)]
        return {"bytes": plan.size, "tensors": {}, "checksum": format_checksum(crc), "ranges": ranges}


def _block_key(array: int, block: int) -> int:
    """A number per block: the journal joins adjacent pieces with equal numbers, and blocks must stay separate."""
    return array << 32 | block


class _BlockWriter(JobRunner):
    def __init__(self, jobs: Sequence[BlockJob], paths: Sequence[Path], threads: int, reader: StateReader) -> None:
        super().__init__(jobs, paths, threads)
        self.blocks, self.reader = jobs, reader

    def do(self, number: int, buffer: memoryview) -> tuple[list[Piece], None]:
        job = self.blocks[number]
        self.reader.read(job.where, job.kind, np.frombuffer(buffer, dtype=np.float32))
        path, done = self.paths[job.file], 0
        with self.writing.use(path) as descriptor:
            try:
                while done < len(buffer):
                    done += os.pwrite(descriptor, buffer[done:], job.offset + done)
            except OSError as error:
                raise ConvertError(f"{path} cannot be written: {error.strerror}") from None
        return [(job.file, _block_key(job.array, job.block), 0, len(buffer), crc32(buffer))], None


def rank_ranges(split: TensorSplit, pp: int, dp: int) -> dict[int, list[TensorRange]]:
    """The ranges of every rank of a layout, by rank, as DeepSpeed's ZeRO-1 partitions them.

    Decoder layers are divided among stages as evenly as possible; parameters with and without weight decay form
    separate flat partitions, each split into `dp` equal parts. A run with other stages can still read the files, but
    each rank then reads from more of them.
    """
    result: dict[int, list[TensorRange]] = {}
    for pp_rank, layers in enumerate(_stages(split, pp)):
        for tp_rank in range(split.tp):
            groups: dict[tuple[bool, bool], list[tuple[int, TensorRow]]] = defaultdict(list)
            for layer, rows in layers:
                for row in rows:
                    groups[row.decays, row.replicated].append((layer, row))
            for dp_rank in range(dp):
                rank = (pp_rank * dp + dp_rank) * split.tp + tp_rank
                result[rank] = [
                    part for members in groups.values() for part in _partition(split, members, tp_rank, dp_rank, dp)
                ]
    return result


def _stages(split: TensorSplit, pp: int) -> list[list[tuple[int, tuple[TensorRow, ...]]]]:
    """The layer files of each stage with their rows; embedding with the first, final norm and head with the last."""
    counts = decoders_by_stage(split.shape.num_layers, pp)
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    stages: list[list[tuple[int, tuple[TensorRow, ...]]]] = [[] for _ in range(pp)]
    for index, layer, rows in layer_files(split.shape):
        stage = stage_of[layer] if layer is not None else 0 if index == 0 else pp - 1
        stages[stage].append((index, rows))
    return stages


def _partition(
    split: TensorSplit, members: list[tuple[int, TensorRow]], tp_rank: int, dp_rank: int, dp: int
) -> list[TensorRange]:
    """The range of each member in one of `dp` equal parts of the members' concatenated elements."""
    sizes = [split.numel(row) for _, row in members]
    part = -(-sum(sizes) // (2 * dp)) * 2  # DeepSpeed aligns parts to four bytes of 16-bit weights
    result, position = [], 0
    for (layer, row), size in zip(members, sizes, strict=True):
        start, stop = max(0, dp_rank * part - position), min(size, (dp_rank + 1) * part - position)
        if start < stop:
            result.append(TensorRange(layer, row.neox, tp_rank, start, stop))
        position += size
    return result


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
