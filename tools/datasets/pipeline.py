"""The parallel part of preprocessing: blocks out to workers, results back in order, a journal to go on from."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import zlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from megatron.data.header import DataHeader, TokenizerInfo, header_path
from megatron.data.indexed import DataError, IndexedWriter, bin_path, idx_path, token_dtype
from megatron.tokenizer import Tokenizer, TokenizerError, build_tokenizer
from tools.datasets.encode import BlockEncoder, Encoded
from tools.datasets.sources import Block, expand, read_blocks

JOURNAL_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
MAX_SHOWN = 20  # skipped records printed in full; all are counted

_encoder: BlockEncoder | None = None  # set before the workers are forked, which inherit it


class BadRecord(ValueError):
    """An unreadable record under the policy `fatal`."""


@dataclass
class KeyState:
    """Where the output of one key stands."""

    bytes: int = 0
    documents: int = 0
    crc32: int = 0
    max_token: int = -1
    text_bytes: int = 0
    empty: int = 0
    skipped: int = 0


@dataclass
class Journal:
    """What a later run needs to go on: how many blocks are in the output, and how long the files then were."""

    job: str
    blocks: int = 0
    keys: dict[str, KeyState] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(json.dumps(asdict(self)))
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path, job: str) -> Journal | None:
        """The journal of a killed run of the same job, None if there is none."""
        try:
            content = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        if content["job"] != job:
            return None
        keys = {key: KeyState(**state) for key, state in content["keys"].items()}
        return cls(job, content["blocks"], keys)


def preprocess(options: argparse.Namespace) -> None:
    """Run the job that the command line describes. Raises BadRecord, DataError, SourceError, TokenizerError, OSError;
    nothing is left behind then, except after a kill."""
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: at least one is needed")
    keys: list[str] = [key for item in options.jsonl_keys for key in item.split(",")]
    files = expand(options.input)
    tokenizer = build_tokenizer(options.tokenizer_type, options.vocab_file)
    if options.prepend_bos and tokenizer.bos is None:
        raise TokenizerError(f"{tokenizer.path}: no begin-of-text token, --prepend-bos cannot be done")
    encoder = BlockEncoder(
        tokenizer=tokenizer,
        keys=keys,
        dtype=token_dtype(tokenizer.vocab_size),
        bos=tokenizer.bos if options.prepend_bos else None,
        eod=tokenizer.eod if options.append_eod else None,
        ftfy=options.ftfy,
    )
    prefixes = {key: f"{options.output_prefix}_{key}_document" for key in keys}
    Path(options.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    job = _job_hash(encoder, files, options.on_bad_record)
    journal_path = Path(f"{options.output_prefix}.partial.json")
    journal = Journal.load(journal_path, job) or Journal(job, 0, {key: KeyState() for key in keys})
    partial = {key: Path(f"{prefix}.partial") for key, prefix in prefixes.items()}
    try:
        writers = {
            key: IndexedWriter(partial[key], encoder.dtype, (journal.keys[key].bytes, journal.keys[key].documents))
            for key in keys
        }
        if journal.blocks:
            print(f"going on after block {journal.blocks} of a killed run", file=sys.stderr)
        blocks = (block for file in files for block in read_blocks(file, keys))
        todo = islice(blocks, journal.blocks, None)
        with contextlib.closing(_in_order(encoder, todo, options.workers)) as results:
            _collect(encoder, results, journal, journal_path, writers, options)
        _publish(encoder, journal, writers, prefixes, files)
    except Exception:
        for path in partial.values():
            for ending in (".bin", ".idx", ".sizes", ".json"):
                Path(f"{path}{ending}").unlink(missing_ok=True)
        journal_path.unlink(missing_ok=True)
        raise
    journal_path.unlink(missing_ok=True)


def _job_hash(encoder: BlockEncoder, files: list[Path], policy: str) -> str:
    """Equal for two runs that must give the same output."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    frame = [encoder.bos, encoder.eod, encoder.ftfy, list(encoder.keys), policy]
    text = json.dumps([encoder.tokenizer.fingerprint, frame, stats])
    return hashlib.sha256(text.encode()).hexdigest()


def _collect(
    encoder: BlockEncoder,
    encoded: Iterable[list[Encoded]],
    journal: Journal,
    journal_path: Path,
    writers: dict[str, IndexedWriter],
    options: argparse.Namespace,
) -> None:
    start = last_sync = time.monotonic()
    first = next(iter(journal.keys.values()))
    already = first.text_bytes
    already_tokens = first.bytes
    shown = 0
    next_report = first.documents + options.log_interval
    for results in encoded:
        for key, result in zip(encoder.keys, results, strict=True):
            shown += _report_bad(result, options.on_bad_record, shown)
            _append(writers[key], journal.keys[key], result)
        journal.blocks += 1
        now = time.monotonic()
        if now - last_sync > JOURNAL_SECONDS:
            for writer in writers.values():
                writer.sync()
            journal.save(journal_path)
            last_sync = now
        if first.documents >= next_report:
            next_report = first.documents + options.log_interval
            seconds = max(now - start, 1e-9)
            tokens = (first.bytes - already_tokens) / encoder.dtype.itemsize / seconds
            share = f" ({first.documents / options.num_docs:.1%})" if options.num_docs else ""
            print(
                f"{first.documents} documents{share}, {(first.text_bytes - already) / seconds / 1e6:.2f} MB/s, "
                f"{tokens:,.0f} tokens/s",
                file=sys.stderr,
            )


def _report_bad(result: Encoded, policy: str, shown: int) -> int:
    if not result.bad:
        return 0
    if policy == "fatal":
        raise BadRecord(f"{result.bad[0]} (--on-bad-record skip leaves such records out and counts them)")
    for message in result.bad[: max(0, MAX_SHOWN - shown)]:
        print(f"skipped: {message}", file=sys.stderr)
    return len(result.bad)


def _append(writer: IndexedWriter, state: KeyState, result: Encoded) -> None:
    writer.append(result.tokens, result.sizes)
    state.bytes, state.documents = writer.bytes, writer.documents
    state.crc32 = zlib.crc32(result.tokens, state.crc32)
    state.max_token = max(state.max_token, result.max_token)
    state.text_bytes += result.text_bytes
    state.empty += result.empty
    state.skipped += len(result.bad)


def _publish(
    encoder: BlockEncoder,
    journal: Journal,
    writers: dict[str, IndexedWriter],
    prefixes: dict[str, str],
    files: list[Path],
) -> None:
    tokenizer: Tokenizer = encoder.tokenizer
    headers = {}
    for key, writer in writers.items():
        state = journal.keys[key]
        if not writer.documents:
            raise DataError(
                f"no documents with text in field {key!r} of {', '.join(map(str, files[:3]))}"
                f"{'...' if len(files) > 3 else ''}: {state.empty} empty, {state.skipped} unreadable"
            )
        writer.finish()
        headers[key] = DataHeader(
            tokenizer=TokenizerInfo(
                type=type(tokenizer).__name__, fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size
            ),
            bos=encoder.bos,
            eod=encoder.eod,
            ftfy=encoder.ftfy,
            documents=writer.documents,
            tokens=writer.bytes // encoder.dtype.itemsize,
            max_token=state.max_token,
            input_bytes=state.text_bytes,
            empty=state.empty,
            skipped=state.skipped,
            crc32=f"{state.crc32:08x}",
            sources=[str(file) for file in files],
        )
    for key, writer in writers.items():
        prefix, header = prefixes[key], headers[key]
        aside = header_path(writer.bin.with_suffix(""))
        aside.write_text(header.model_dump_json(indent=2) + "\n")
        idx_path(prefix).unlink(missing_ok=True)  # a reader sees the old set, none, or the new one; never a mixture
        os.replace(writer.bin, bin_path(prefix))
        os.replace(aside, header_path(prefix))
        os.replace(writer.idx, idx_path(prefix))
        print(
            f"{prefix}: {header.documents} documents, {header.tokens} tokens, {header.empty} empty and "
            f"{header.skipped} unreadable left out",
            file=sys.stderr,
        )


def _in_order(encoder: BlockEncoder, blocks: Iterable[Block], workers: int) -> Generator[list[Encoded], None, None]:
    """Results in the order of the blocks. Only a few blocks per worker are under way, so memory does not grow."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core; threads inside them would only compete
    _encoder = encoder
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        pending: deque[Future[list[Encoded]]] = deque()
        try:
            for block in blocks:
                pending.append(pool.submit(_encode_block, block))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError("a worker process was killed, probably for memory; use fewer --workers") from error
        finally:
            with contextlib.suppress(Exception):
                pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """ctrl-C is the parent's to handle; and when the parent is killed, so is the worker, which would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _encode_block(block: Block) -> list[Encoded]:
    assert _encoder is not None
    return _encoder(block)
