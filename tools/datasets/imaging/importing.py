"""The import: blocks of images go to workers, results return in order, a journal allows resuming, then publication."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron.common import crc
from megatron.common.atomic_files import write_text
from megatron.data.header import header_path
from megatron.data.images import ImageHeader, ImageInfo
from megatron.data.indexed import DataError, IndexedWriter, bin_path, idx_path
from tools.datasets.encoding.progress import Progress
from tools.datasets.encoding.workers import in_order
from tools.datasets.imaging.decode import BandMoments, ImageBlock, ImageDecoder
from tools.datasets.imaging.joining import PropertyTable
from tools.datasets.imaging.properties import write_properties
from tools.datasets.imaging.sources import ImageSourceFiles
from tools.datasets.imaging.writing import Baton, BlockWriter, WrittenBlock

JOURNAL_SECONDS = 10.0
MAX_NAMED = 20  # left-out images named on the terminal; a file names all of them
MAX_IN_HEADER = 100


@dataclass
class ImportState:
    """The position of an import: blocks done, the lengths of the files then, and statistics of the images."""

    blocks: int = 0
    bytes: int = 0
    documents: int = 0
    crc32: int = 0
    named_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    bad_images: list[str] = field(default_factory=list)
    moments: BandMoments = field(default_factory=lambda: BandMoments([], [], []))

    @classmethod
    def load(cls, path: Path, identity: str) -> ImportState:
        """The state of a killed run of the same import, else a fresh one."""
        try:
            content = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return cls()
        if content.pop("identity", None) != identity:
            return cls()
        return cls(**content | {"moments": BandMoments(**content["moments"])})

    def journal(self, identity: str) -> str:
        return json.dumps({"identity": identity, **asdict(self)})


class Settling:
    """Syncs the files and writes the journal in a background thread, while the workers continue."""

    def __init__(self, journal: Path, identity: str, writer: IndexedWriter, files: Sequence[Any]) -> None:
        self._journal, self._identity, self._writer, self._files = journal, identity, writer, files
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def begin(self, state: ImportState) -> None:
        """Start syncing, unless the last sync is still running. Raises OSError if the last one did."""
        if self._last is None or self._last.done():
            self._wait()
            self._last = self._thread.submit(self._settle, state.journal(self._identity))

    def finish(self, state: ImportState) -> None:
        self._wait()
        self._settle(state.journal(self._identity))

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _settle(self, journal: str) -> None:
        """Sync, then write `journal`. The files may hold more by then; resuming truncates them to what it says."""
        self._writer.sync()
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        write_text(self._journal, journal)


@dataclass(frozen=True)
class ImageImport:
    """An import job. Two imports with equal settings and inputs give the same files, byte for byte."""

    inputs: list[str]
    sources: Sequence[ImageSourceFiles]
    decoder: ImageDecoder
    block_size: int
    bands: list[str]
    prefix: str
    workers: int
    stops_at_bad: bool
    settings: tuple[Any, ...]
    table: PropertyTable | None = None

    @property
    def partial(self) -> Path:
        return Path(f"{self.prefix}.partial")

    def identity(self) -> str:
        stats = [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for source in self.sources
            for path in source.files
        ]
        return hashlib.sha256(
            json.dumps([self.settings, self.block_size, self.bands, stats], default=str).encode()
        ).hexdigest()

    def blocks(self, first: int) -> Iterator[tuple[int, ImageBlock]]:
        """(number, block) from number `first` on."""
        found = chain.from_iterable(source.blocks(k, self.block_size) for k, source in enumerate(self.sources))
        return islice(enumerate(found), first, None)


def run_import(job: ImageImport) -> ImageHeader:
    """Run the import. Raises DataError or OSError and then leaves nothing behind, except after a kill."""
    journal, identity = Path(f"{job.partial}.json"), job.identity()
    journal.parent.mkdir(parents=True, exist_ok=True)
    state = ImportState.load(journal, identity)
    rows, named = Path(f"{job.partial}.rows"), Path(f"{job.partial}.left_out.txt")
    try:
        writer = IndexedWriter(job.partial, job.decoder.dtype, (state.bytes, state.documents))
        if state.blocks:
            print(f"resuming after block {state.blocks} of a killed run", file=sys.stderr)
        work = BlockWriter(job.decoder, Baton(job.workers, state.blocks, state.bytes), writer.fileno())
        with (
            _continued(rows, 16 * state.documents) as row_file,
            _continued(named, state.named_bytes) as named_file,
            contextlib.closing(in_order(work, job.blocks(state.blocks), job.workers)) as results,
            Settling(journal, identity, writer, (row_file, named_file)) as settling,
        ):
            _collect(job, results, state, (writer, row_file, named_file), settling)
            settling.finish(state)
        header = _publish(job, state, writer, rows, named)
    except Exception:
        for ending in (".bin", ".idx", ".sizes", ".json", ".rows", ".left_out.txt", ".parquet"):
            Path(f"{job.partial}{ending}").unlink(missing_ok=True)
        raise
    for path in (journal, rows, named):
        path.unlink(missing_ok=True)
    return header


@contextlib.contextmanager
def _continued(path: Path, length: int) -> Iterator[Any]:
    """Open a file to continue writing at byte `length`; anything after it is dropped."""
    with path.open("r+b" if length else "wb") as file:
        file.truncate(length)
        file.seek(length)
        yield file


def _collect(
    job: ImageImport,
    results: Iterable[WrittenBlock],
    state: ImportState,
    files: tuple[IndexedWriter, Any, Any],
    settling: Settling,
) -> None:
    writer, row_file, named_file = files
    progress = Progress(sum(path.stat().st_size for source in job.sources for path in source.files))
    values = int(np.prod(job.decoder.shape))
    last = time.monotonic()
    for result in results:
        for rule, message in result.bad:
            if job.stops_at_bad:
                raise DataError(f"{message} (--on-bad-image skip leaves such images out, names and counts them)")
            if sum(state.left_out.values()) < MAX_NAMED:
                print(f"left out: {message}", file=sys.stderr)
            if len(state.bad_images) < MAX_IN_HEADER:
                state.bad_images.append(message)
            state.left_out[rule] = state.left_out.get(rule, 0) + 1
            state.named_bytes += named_file.write(f"{message}\n".encode())
        if result.rows:
            writer.appended(result.nbytes, np.full(len(result.rows), values, np.int32))
            row_file.write(np.array(result.rows, np.int64).tobytes())
            state.crc32 = crc.combine(state.crc32, result.crc32, result.nbytes)
            state.moments = state.moments.joined(result.moments)
        state.blocks += 1
        state.bytes, state.documents = writer.bytes, writer.documents
        now = time.monotonic()
        if now - last > JOURNAL_SECONDS:
            settling.begin(state)
            last = now
        if progress.due(state.documents):
            print(
                f"{state.documents:,} images, {state.documents / progress.seconds:,.0f} per second",
                file=sys.stderr,
                flush=True,
            )


def _publish(job: ImageImport, state: ImportState, writer: IndexedWriter, rows: Path, named: Path) -> ImageHeader:
    """Rename all files into place, the index last: a reader sees the old set, none, or the new one."""
    if not state.documents:
        reasons = ", ".join(f"{rule} {count}" for rule, count in state.left_out.items()) or "there are none"
        raise DataError(f"nothing to write to {job.prefix}: no image can be used ({reasons})")
    writer.finish()
    properties = Path(f"{job.prefix}.parquet")
    partial_properties = Path(f"{job.partial}.parquet")
    write_properties(partial_properties, job.sources, rows, job.table)
    height, width, _ = job.decoder.shape
    header = ImageHeader(
        images=ImageInfo(
            height=height,
            width=width,
            bands=job.bands,
            dtype=job.decoder.dtype.name,
            mean=state.moments.mean,
            std=state.moments.std(),
        ),
        documents=state.documents,
        crc32=f"{state.crc32:08x}",
        sources=job.inputs,
        left_out=state.left_out,
        bad_images=state.bad_images,
        properties=properties.name,
    )
    idx_path(job.prefix).unlink(missing_ok=True)
    list_of_bad = Path(f"{job.prefix}.left_out.txt")
    if state.left_out:
        os.replace(named, list_of_bad)
    else:
        list_of_bad.unlink(missing_ok=True)
    os.replace(bin_path(job.partial), bin_path(job.prefix))
    os.replace(partial_properties, properties)
    write_text(header_path(job.prefix), header.model_dump_json(indent=2) + "\n")
    os.replace(idx_path(job.partial), idx_path(job.prefix))
    return header
