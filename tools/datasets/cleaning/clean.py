"""The part of cleaning that runs in one process: duplicates, counts, the output and the report."""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron.common.atomic_files import replacing, write_bytes
from megatron.data.indexed import DataError
from tools.datasets.cleaning.cleaner import Cleaned, Cleaner, luck
from tools.datasets.cleaning.duplicates import Index
from tools.datasets.cleaning.page import page
from tools.datasets.cleaning.perplexity import Perplexity
from tools.datasets.cleaning.report import Drop, Example, Report
from tools.datasets.cleaning.rules import Rules
from tools.datasets.encoding.pipeline import report_bad
from tools.datasets.encoding.progress import Progress
from tools.datasets.encoding.records import InputFiles, SourceError, read_blocks, read_record, text_of
from tools.datasets.encoding.workers import in_order

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class CleaningJob:
    inputs: InputFiles
    output: Path
    report: Path  # folder
    key: str
    rules: Rules
    perplexity: Perplexity | None
    workers: int
    log_interval: int | None


def run_cleaning(job: CleaningJob) -> Report:
    """Write both the output and the report, or neither. Raises BadRecord, DataError, SourceError, OSError."""
    check_output(job.output, job.inputs)
    job.inputs.check([job.key])
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.report.mkdir(parents=True, exist_ok=True)
    report = Report(job.rules, [str(file) for file in job.inputs.files], str(job.output))
    progress = Progress(job.inputs.bytes, job.log_interval)
    blocks = job.inputs.blocks([job.key], None, progress)
    try:
        with replacing(job.output) as output, replacing(job.report / "dropped.jsonl") as dropped:
            cleaner = Cleaner(job.rules, job.key, job.perplexity)
            with (
                writer(output, job.output.suffix) as out,
                dropped.open("w", encoding="utf-8") as log,
                contextlib.closing(in_order(cleaner, blocks, job.workers)) as results,
            ):
                for line in _collect(job, report, results, log, progress):
                    out.write(line + b"\n")
            if not report.kept:
                raise DataError(f"nothing is left: {report.documents} documents, {dict(report.dropped)} dropped")
            _find_earlier(job, report)
            write_cleaning_report(report, job.report)
    except BaseException:
        with contextlib.suppress(OSError):
            job.report.rmdir()  # if empty, it was created by this run
        raise
    return report


def check_output(output: Path, inputs: InputFiles) -> None:
    """DataError if a corpus cannot be written to this path."""
    if not output.name.endswith(OUTPUT_SUFFIXES):
        raise DataError(f"--output {output}: expected a name that ends in {', '.join(OUTPUT_SUFFIXES)}")
    if output.resolve() in [file.resolve() for file in inputs.files]:
        raise DataError(f"--output {output}: this is one of the inputs")


def _collect(
    job: CleaningJob, report: Report, results: Iterator[Cleaned], log: IO[str], progress: Progress
) -> Iterator[bytes]:
    """Yield the lines of the output. Finds duplicates and counts everything, in the order of the corpus."""
    index = Index(job.rules.exact_duplicate, job.rules.near_duplicate)
    places: list[tuple[str, str, int]] = []  # of the documents in the index
    for cleaned in results:
        report.unreadable += report_bad(cleaned.bad, job.inputs.skip_bad, report.unreadable)
        for message in cleaned.bad:
            log.write(json.dumps({"rule": "unreadable", "message": message}, ensure_ascii=False) + "\n")
        for document in cleaned.documents:
            line, where = document.line, f"{cleaned.source}, {cleaned.unit} {document.number}"
            chance = luck(cleaned.source, document.number)
            # A duplicate of an earlier document is dropped, and needs its text to be shown as an example.
            if document.signature is not None:
                found = index.find(document.signature)
                if found is None:
                    index.add(len(places), document.signature)
                    places.append((cleaned.source, cleaned.unit, document.number))
                else:
                    rule, similarity, earlier = found
                    limit = 1.0 if rule == "exact_duplicate" else job.rules.near_duplicate
                    document.drop = Drop(rule, similarity, limit, places[earlier])
                    if report.wants(rule, chance):
                        assert line is not None
                        text = json.loads(line)[job.key]
                        document.texts = (text, text)
            report.count(document)
            kind = document.kind
            if kind is not None and document.texts is not None and report.wants(kind, chance):
                report.show(kind, Example(chance, where, *document.texts, document.drop))
            if document.drop is None:
                assert line is not None
                yield line
            else:
                entry = {
                    "source": cleaned.source,
                    cleaned.unit: document.number,
                    "rule": document.drop.rule,
                    "value": round(document.drop.value, 6),
                    "limit": document.drop.limit,
                    **({"like": "{}, {} {}".format(*document.drop.like)} if document.drop.like else {}),
                    "characters": document.before,
                    "start": document.start,
                }
                log.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if progress.due(report.documents):
            rate = report.characters / progress.seconds / 1e6
            print(
                f"{report.documents:,} documents, {report.kept:,} kept, {progress.left()}, "
                f"{rate:.2f} million characters/s",
                file=sys.stderr,
                flush=True,
            )


def _find_earlier(job: CleaningJob, report: Report) -> None:
    """Reread the earlier texts of the example duplicates, for the page."""
    wanted: dict[str, dict[int, list[Example]]] = {}
    for example in (example for lot in report.examples.values() for example in lot):
        if example.drop is not None and example.drop.like is not None:
            source, _, number = example.drop.like
            wanted.setdefault(source, {}).setdefault(number, []).append(example)
    for source, numbers in wanted.items():
        for block in read_blocks(Path(source), [job.key], [job.key]):
            for number in sorted(numbers):
                if 0 <= number - block.first < len(block):
                    record = read_record(block, number - block.first)
                    for example in numbers.pop(number):
                        example.earlier = None if record is None else text_of(record, job.key)
            if not numbers:
                break


@contextlib.contextmanager
def writer(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    """Open a file for writing, compressed according to `suffix`. Equal content gives equal files."""
    with path.open("wb") as raw:
        if suffix == ".gz":
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as stream:
                yield stream  # type: ignore[misc]
        elif suffix == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise SourceError(f"{path}: writing .zst needs the package zstandard (pip install .[data])") from error
            with zstandard.ZstdCompressor(3).stream_writer(raw, closefd=False) as stream:
                yield stream
        else:
            yield raw


def write_cleaning_report(report: Report, folder: Path) -> None:
    """Write summary.json and page.html."""
    for name, text in (
        ("summary.json", json.dumps(report.summary(), indent=1, ensure_ascii=False) + "\n"),
        ("page.html", page(report)),
    ):
        write_bytes(folder / name, text.encode(errors="replace"))
