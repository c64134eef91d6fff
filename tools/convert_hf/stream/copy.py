"""Execute a plan: worker threads with one buffer each, CRCs on the fly, and a journal that survives a kill."""

from __future__ import annotations

import json
import mmap
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.common.atomic_files import write_text
from megatron.common.crc import combine, crc32, zeros

from ..errors import ConvertError
from .band_io import FilePool, read_band, region_runs, write_runs
from .plan import CopyJob, CopyPlan, Destination
from .tensor_map import rows_and_columns

SYNC_SECONDS = 5.0  # between syncs: if the machine crashes, at most this much work is lost

Piece = tuple[int, int, int, int, int]  # file, tensor, first byte within the tensor, bytes, CRC-32


class Checksums:
    """CRCs of byte ranges. Adjacent ranges are joined immediately, so memory does not grow with the model."""

    def __init__(self) -> None:
        self._starts: dict[tuple[int, int, int], tuple[int, int]] = {}  # (file, tensor, start) -> (bytes, CRC-32)
        self._ends: dict[tuple[int, int, int], int] = {}  # (file, tensor, end) -> start

    def add(self, piece: Piece) -> None:
        file, tensor, start, nbytes, crc = piece
        left = self._ends.pop((file, tensor, start), None)
        if left is not None:
            before, left_crc = self._starts.pop((file, tensor, left))
            start, nbytes, crc = left, before + nbytes, combine(left_crc, crc, nbytes)
        right = self._starts.pop((file, tensor, start + nbytes), None)
        if right is not None:
            crc = combine(crc, right[1], right[0])
            nbytes += right[0]
        self._starts[file, tensor, start] = (nbytes, crc)
        self._ends[file, tensor, start + nbytes] = start

    def whole(self, file: int, tensor: int, nbytes: int) -> int | None:
        """The CRC of a tensor of `nbytes` bytes if exactly its bytes were added; None otherwise."""
        found = self._starts.get((file, tensor, 0))
        return found[1] if found is not None and found[0] == nbytes else None


class BandSource(Protocol):
    """Source of a plan's bands: stored files, or a computation over several checkpoints."""

    def read(self, job: CopyJob, band: memoryview) -> Any:
        """Fill `band`; called by several threads at once. The remark returned (None or JSON) goes into the journal."""

    def account(self, remark: Any) -> None:
        """Receive the remark of `read`, once per job, including jobs that an earlier run finished."""

    def summary(self) -> Any:
        """Summary of this share once all its jobs are done, as JSON."""

    def files(self, summaries: list[Any]) -> Mapping[str, bytes | Path]:
        """Small files, by name in the output folder, that depend on the summaries of all shares."""

    def close(self) -> None: ...


class StoredBands:
    """Bands read from the files of one checkpoint."""

    def __init__(self) -> None:
        self._pool = FilePool(os.O_RDONLY)

    def read(self, job: CopyJob, band: memoryview) -> None:
        read_band(self._pool, job.tensor, job.start, job.stop, band)

    def account(self, remark: Any) -> None:
        pass

    def summary(self) -> None:
        pass

    def files(self, summaries: list[Any]) -> Mapping[str, bytes | Path]:
        return {}

    def close(self) -> None:
        self._pool.close()


@dataclass
class Finished:
    job: int
    nbytes: int
    pieces: list[Piece]
    remark: Any = None  # returned by the source for the band


class Sized(Protocol):
    """A job that needs a buffer of `nbytes` bytes."""

    @property
    def nbytes(self) -> int: ...


class JobRunner(ABC):
    """Runs jobs on threads, each with its own buffer, and journals finished jobs once their data are synced.

    `paths` are the files that jobs write; they already have their final sizes.
    """

    def __init__(self, jobs: Sequence[Sized], paths: Sequence[Path], threads: int) -> None:
        self.jobs, self.paths, self.threads = jobs, paths, threads
        self.writing = FilePool(os.O_WRONLY)
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Finished | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()

    @abstractmethod
    def do(self, number: int, buffer: memoryview) -> tuple[list[Piece], Any]:
        """Do job `number` with its buffer; return the pieces written, and a remark for the journal."""

    def close(self) -> None:
        self.writing.close()

    def run(self, journal: CopyJournal, progress: Callable[[int], None]) -> None:
        """Run the jobs that the journal lacks. Finished work is synced and journaled every few seconds; the last part
        is noted in memory only, because the caller completes and syncs all files next."""
        jobs = [i for i in range(len(self.jobs)) if i not in journal.finished]
        for i in jobs:
            self._todo.put(i)
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(min(self.threads, len(jobs)))]
        for worker in workers:
            worker.start()
        try:
            self._gather(len(jobs), journal, progress)
        finally:
            self._stop.set()
            for worker in workers:
                worker.join()
            self.close()

    def _gather(self, count: int, journal: CopyJournal, progress: Callable[[int], None]) -> None:
        waiting: list[Finished] = []
        last = time.monotonic()
        for _ in range(count):
            item = self._done.get()
            if isinstance(item, BaseException):
                raise item
            waiting.append(item)
            progress(item.nbytes)
            if time.monotonic() - last > SYNC_SECONDS:
                self._record(waiting, journal)
                waiting, last = [], time.monotonic()
        journal.note(waiting)

    def _record(self, done: list[Finished], journal: CopyJournal) -> None:
        self.writing.sync({self.paths[piece[0]] for item in done for piece in item.pieces})
        journal.add(done)

    def _work(self) -> None:
        try:
            largest = max((job.nbytes for job in self.jobs), default=0)
            buffer = memoryview(mmap.mmap(-1, max(largest, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            while not self._stop.is_set():
                try:
                    number = self._todo.get_nowait()
                except queue.Empty:
                    return
                nbytes = self.jobs[number].nbytes
                pieces, remark = self.do(number, buffer[:nbytes])
                self._done.put(Finished(number, nbytes, pieces, remark))
        except BaseException as error:
            self._done.put(error)


class Copier(JobRunner):
    """Copies all bands of a plan into `folder`, whose files already have their final sizes."""

    def __init__(self, plan: CopyPlan, folder: Path, threads: int, source: BandSource) -> None:
        super().__init__(plan.jobs, [folder / file.name for file in plan.files], threads)
        self.plan, self.source = plan, source

    def do(self, number: int, buffer: memoryview) -> tuple[list[Piece], Any]:
        job = self.plan.jobs[number]
        remark = self.source.read(job, buffer)
        return list(self._copy(job, buffer)), remark

    def _copy(self, job: CopyJob, band: memoryview) -> Iterator[Piece]:
        cols = rows_and_columns(job.tensor.shape)[1]
        cast: dict[str, memoryview] = {}
        for destination in self.plan.destinations[job.tensor.name]:
            dtype = destination.region.stored.dtype
            data = band
            if dtype != job.tensor.dtype:
                if dtype.name not in cast:
                    from .cast import cast_band

                    cast[dtype.name] = cast_band(band, job.tensor.dtype.name, dtype.name, job.tensor.name)
                data = cast[dtype.name]
            runs = region_runs(destination.region, job.start, job.stop, cols, dtype.itemsize)
            if runs:
                yield self._write(destination, runs, data)

    def _write(self, destination: Destination, runs: list[tuple[int, int, int]], data: memoryview) -> Piece:
        crc = 0
        for _, nbytes, place in runs:
            crc = crc32(data[place : place + nbytes], crc)
        path = self.paths[destination.file]
        first, total = runs[0][0] - destination.region.stored.offset, sum(run[1] for run in runs)
        with self.writing.use(path) as descriptor:
            try:
                write_runs(descriptor, runs, data)
            except OSError as error:
                raise ConvertError(f"{path} cannot be written: {error.strerror}") from None
        return destination.file, destination.tensor, first, total, crc


class CopyJournal:
    """The finished jobs of a run: a line that identifies the plan, then one JSON line per job.

    `account` is called with every remark.
    """

    def __init__(
        self, path: Path, digest: str, resume: bool, account: Callable[[Any], None] = lambda remark: None
    ) -> None:
        self.path = path
        self._account = account
        self.finished: set[int] = set()
        self.checksums = Checksums()
        if resume and path.exists():
            self._read(digest)
        else:
            write_text(path, json.dumps({"plan": digest}) + "\n")  # complete or absent, whenever the process is killed
        self._file = open(path, "a")  # noqa: SIM115 closed by close()

    def _read(self, digest: str) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if not whole or json.loads(whole[0]) != {"plan": digest}:
            raise ConvertError(
                f"{self.path.parent} was started from other files or with other options; "
                f"use the same ones, or start over with --force"
            )
        for line in whole[1:]:
            entry = json.loads(line)
            self._keep(entry["job"], entry["pieces"], entry.get("remark"))
        if len(whole) != len(lines):  # the last line was truncated by a kill
            write_text(self.path, "".join(whole))

    def _keep(self, job: int, pieces: list[Piece], remark: Any) -> None:
        if job not in self.finished:
            self.finished.add(job)
            for piece in pieces:
                self.checksums.add(piece)
            if remark is not None:
                self._account(remark)

    def note(self, done: list[Finished]) -> None:
        """Mark jobs as finished, in memory only."""
        for item in done:
            self._keep(item.job, item.pieces, item.remark)

    def add(self, done: list[Finished]) -> None:
        """Mark jobs as finished and write them to the file; their data must be synced."""
        self.note(done)
        for item in done:
            entry = {"job": item.job, "pieces": item.pieces}
            self._file.write(json.dumps(entry if item.remark is None else entry | {"remark": item.remark}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def tensor_crcs(plan: CopyPlan, checksums: Checksums) -> list[dict[str, int]]:
    """CRC-32 of every tensor, by file; checks that every byte was written exactly once."""
    result: list[dict[str, int]] = []
    for f, file in enumerate(plan.files):
        result.append({})
        for t, target in enumerate(file.tensors):
            row_bytes = rows_and_columns(target.stored.shape)[1] * target.stored.dtype.itemsize
            for region in target.regions:
                if region.logical is None:  # padding: the file was created with zeros
                    nbytes = region.rows * row_bytes
                    checksums.add((f, t, region.row * row_bytes, nbytes, zeros(nbytes)))
            crc = checksums.whole(f, t, target.stored.nbytes)
            if crc is None:
                raise AssertionError(f"{file.name}: {target.stored.name} was not written exactly once")
            result[-1][target.stored.name] = crc
    return result


def preallocate(path: Path, size: int, keep: bool) -> None:
    """Create a file of `size` zero bytes; with `keep`, an existing file of that size is kept."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
        try:
            if not keep or os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, 0)
                os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConvertError(f"{path} cannot be written: {error.strerror}") from None
