"""The parallel part of preprocessing: blocks go to workers, results come back in order, a journal allows resuming."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron.common.atomic_files import write_text
from megatron.common.crc import crc32
from megatron.common.errors import UserError
from megatron.data.header import ChatInfo, DataHeader, TokenizerInfo, header_path
from megatron.data.indexed import DataError, IndexedWriter, bin_path, idx_path
from megatron.tokenizer import Tokenizer
from tools.datasets.encoding.encode import Encoded
from tools.datasets.encoding.progress import Progress
from tools.datasets.encoding.records import Block, InputFiles
from tools.datasets.encoding.workers import in_order

JOURNAL_SECONDS = 10.0
MAX_SHOWN = 20  # skipped records printed in full; all are counted


class BadRecord(UserError, ValueError):
    """An unreadable record, with `--on-bad-record fatal`."""


class Encoder(Protocol):
    """Runs in the workers: encodes a block for each output, in the order of `EncodingJob.outputs`."""

    def __call__(self, block: Block) -> list[Encoded]: ...


@dataclass
class State:
    """Progress of one output."""

    bytes: int = 0
    documents: int = 0
    crc32: int = 0
    max_token: int = -1
    text_bytes: int = 0
    learned: int = 0
    empty: int = 0
    skipped: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # skipped records by rule
    unknown: dict[str, int] = field(default_factory=dict)  # unused fields
    longer: dict[str, int] = field(default_factory=dict)  # documents longer than a sample, by its length in tokens

    @property
    def left_out(self) -> str:
        rules = "".join(f", {rule} {count}" for rule, count in self.dropped.items())
        return f"{self.empty} empty and {self.skipped} unreadable skipped{rules}"


@dataclass(frozen=True)
class IndexedOutput:
    """One `.bin/.idx` to write. `header` makes its header file; None for no header."""

    prefix: str
    dtype: np.dtype
    header: Callable[[State], DataHeader] | None

    @property
    def partial(self) -> Path:
        return Path(f"{self.prefix}.partial")


@dataclass(frozen=True)
class HeaderMaker:
    """Makes `IndexedOutput.header` from facts known before writing, and the counts at the end."""

    tokenizer: Tokenizer
    dtype: np.dtype
    bos: int | None
    eod: int | None
    ftfy: bool
    inputs: InputFiles
    chat: Callable[[State], ChatInfo] | None = None

    def __call__(self, state: State) -> DataHeader:
        return DataHeader(
            tokenizer=TokenizerInfo.of(self.tokenizer),
            bos=self.bos,
            eod=self.eod,
            ftfy=self.ftfy,
            documents=state.documents,
            tokens=state.bytes // self.dtype.itemsize,
            max_token=state.max_token,
            input_bytes=state.text_bytes,
            empty=state.empty,
            skipped=state.skipped,
            crc32=f"{state.crc32:08x}",
            sources=[str(file) for file in self.inputs.files],
            bad_files=list(self.inputs.bad.values()),
            unknown_keys=dict(state.unknown),
            chat=None if self.chat is None else self.chat(state),
        )


@dataclass(frozen=True)
class EncodingJob:
    """An encoding job. Jobs with equal `identity` must give the same output: one resumes where another was killed."""

    identity: str
    encoder: Encoder
    blocks: Iterable[Block]
    progress: Progress  # counts the bytes read
    outputs: list[IndexedOutput]
    journal: Path
    workers: int
    skip_bad: bool
    num_docs: int | None


@dataclass
class EncodingJournal:
    """State for resuming: the number of blocks in the outputs, and the length of the files at that point."""

    identity: str
    blocks: int
    states: list[State]

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path, identity: str) -> EncodingJournal | None:
        """The journal of a killed run of the same job; None if there is none."""
        try:
            content = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        if content.get("identity") != identity:
            return None
        return cls(identity, content["blocks"], [State(**state) for state in content["states"]])


def identity_of(tokenizer: Tokenizer, files: list[Path], settings: list[object]) -> str:
    """A digest that is equal for runs over the same files with the same settings."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([tokenizer.fingerprint, settings, stats])
    return hashlib.sha256(text.encode()).hexdigest()


def run_encoding(job: EncodingJob) -> list[State]:
    """Run the job. Raises BadRecord, DataError, SourceError, OSError; a failed job leaves nothing behind."""
    if job.workers < 1:
        raise DataError(f"--workers {job.workers}: at least one is needed")
    job.journal.parent.mkdir(parents=True, exist_ok=True)
    journal = EncodingJournal.load(job.journal, job.identity) or EncodingJournal(
        job.identity, 0, [State() for _ in job.outputs]
    )
    try:
        writers = [
            IndexedWriter(output.partial, output.dtype, (state.bytes, state.documents))
            for output, state in zip(job.outputs, journal.states, strict=True)
        ]
        if journal.blocks:
            print(f"resuming after block {journal.blocks} of a killed run", file=sys.stderr)
        todo = islice(job.blocks, journal.blocks, None)
        with contextlib.closing(in_order(job.encoder, todo, job.workers)) as results:
            _collect(job, results, journal, writers)
        _publish(job, journal.states, writers)
    except Exception:
        for output in job.outputs:
            for ending in (".bin", ".idx", ".sizes", ".json"):
                Path(f"{output.partial}{ending}").unlink(missing_ok=True)
        job.journal.unlink(missing_ok=True)
        raise
    job.journal.unlink(missing_ok=True)
    return journal.states


def _collect(
    job: EncodingJob, encoded: Iterable[list[Encoded]], journal: EncodingJournal, writers: list[IndexedWriter]
) -> None:
    start = last_sync = time.monotonic()
    before = _done(journal.states)
    shown = 0
    for results in encoded:
        for writer, state, result in zip(writers, journal.states, results, strict=True):
            shown += report_bad([entry.message for entry in result.bad], job.skip_bad, shown)
            _append(writer, state, result)
        journal.blocks += 1
        now = time.monotonic()
        if now - last_sync > JOURNAL_SECONDS:
            for writer in writers:
                writer.sync()
            journal.save(job.journal)
            last_sync = now
        documents = sum(state.documents for state in journal.states if state.text_bytes)
        if job.progress.due(documents):
            seconds = max(now - start, 1e-9)
            rate = (_done(journal.states) - before) / seconds / 1e6
            share = f" ({documents / job.num_docs:.1%})" if job.num_docs else ""
            print(
                f"{documents:,} documents{share}, {job.progress.left()}, {rate:.2f} MB/s", file=sys.stderr, flush=True
            )


def _done(states: list[State]) -> int:
    """Bytes of encoded text."""
    return sum(state.text_bytes for state in states)


def report_bad(messages: Sequence[str], skip: bool, shown: int) -> int:
    """Print the problems of skipped records, up to MAX_SHOWN including the `shown` earlier ones; returns their number.

    BadRecord unless `skip`.
    """
    if messages and not skip:
        raise BadRecord(f"{messages[0]} (--on-bad-record skip skips and counts such records)")
    for message in messages[: max(0, MAX_SHOWN - shown)]:
        print(f"skipped: {message}", file=sys.stderr)
    return len(messages)


def _append(writer: IndexedWriter, state: State, result: Encoded) -> None:
    writer.append(result.tokens, result.sizes)
    state.bytes, state.documents = writer.bytes, writer.documents
    state.crc32 = crc32(result.tokens, state.crc32)
    state.max_token = max(state.max_token, result.max_token)
    state.text_bytes += result.text_bytes
    state.learned += result.learned
    state.empty += result.empty
    state.skipped += len(result.bad)
    _add(state.dropped, result.dropped)
    _add(state.dropped, Counter(entry.rule for entry in result.bad))
    _add(state.unknown, result.unknown)
    _add(state.longer, result.longer)


def _add(counts: dict[str, int], more: Counter[str]) -> None:
    for key, count in more.items():
        counts[key] = counts.get(key, 0) + count


def _publish(job: EncodingJob, states: list[State], writers: list[IndexedWriter]) -> None:
    """Publish every output that has documents; DataError if none has."""
    parts = list(zip(job.outputs, states, writers, strict=True))
    if not any(writer.documents for _, _, writer in parts):
        raise DataError(
            f"nothing to write to {job.outputs[0].prefix}: no documents with text in the input, {states[0].left_out}"
        )
    for output, state, writer in parts:
        writer.finish()
        if output.header is not None:
            write_text(header_path(output.partial), output.header(state).model_dump_json(indent=2) + "\n")
    for output, _, writer in parts:  # readers see the old set, none, or the new set, never a mixture
        if writer.documents:
            idx_path(output.prefix).unlink(missing_ok=True)
    for output, state, writer in parts:
        if not writer.documents:
            for path in (bin_path(output.partial), idx_path(output.partial), header_path(output.partial)):
                path.unlink(missing_ok=True)
            print(f"{output.prefix}: no documents, nothing written; {state.left_out}", file=sys.stderr)
            continue
        os.replace(bin_path(output.partial), bin_path(output.prefix))
        if output.header is not None:
            os.replace(header_path(output.partial), header_path(output.prefix))
        os.replace(idx_path(output.partial), idx_path(output.prefix))
        print(
            f"{output.prefix}: {state.documents} documents, {state.bytes // output.dtype.itemsize} tokens, "
            f"{state.left_out}",
            file=sys.stderr,
        )
