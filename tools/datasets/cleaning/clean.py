"""The work of `clean_corpus.py`: what a worker does to a block of records, and what becomes of its results."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import heapq
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron.data.indexed import DataError
from tools.datasets.cleaning.duplicates import Index, Signature, signature
from tools.datasets.cleaning.perplexity import Perplexity
from tools.datasets.cleaning.repetition import cut, find_loops, repeated_shares
from tools.datasets.cleaning.rules import Rules
from tools.datasets.encoding.encode import read_record, text_of
from tools.datasets.encoding.pipeline import MAX_SHOWN, BadRecord
from tools.datasets.encoding.sources import Block, SourceError, read_blocks
from tools.datasets.encoding.workers import in_order

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
EXAMPLES = 4  # of each rule and each kind of repair on the page
_STRANGE = re.compile("[\ufffd\ue000-\uf8ff]")  # the replacement character, and the private use of PDF fonts


@dataclass(frozen=True)
class Drop:
    """Why a document is not in the output: the rule, what was measured and what the rule allows."""

    rule: str
    value: float
    limit: float
    like: tuple[str, str, int] | None = None  # file, unit and number of the earlier document, for duplicates


@dataclass
class Document:
    """One record, after the work of a worker."""

    number: int  # of the record in its file, from 1
    start: str  # its first characters
    before: int  # characters
    after: int
    repaired: bool  # ftfy changed something
    loops: int  # characters cut
    line: bytes | None  # what goes to the output; None if dropped
    drop: Drop | None
    signature: Signature | None
    perplexity: float | None
    texts: tuple[str, str] | None  # before and after, where this is one of the block's examples

    @property
    def kind(self) -> str | None:
        """What it could be an example of."""
        if self.drop is not None:
            return self.drop.rule
        return "loops" if self.loops else "unicode" if self.repaired else None


@dataclass
class Cleaned:
    source: str
    unit: str
    documents: list[Document] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cleaner:
    """What a worker knows. Called with a block of records."""

    rules: Rules
    key: str
    perplexity: Perplexity | None

    def __call__(self, block: Block) -> Cleaned:
        result = Cleaned(block.source, block.unit)
        for position in range(len(block)):
            try:
                record = read_record(block, position)
                text = None if record is None else text_of(record, self.key)
            except ValueError as error:
                result.bad.append(f"{block.where(position)}: {error}")
                continue
            if record is not None and text is not None:
                result.documents.append(self._clean(block.first + position, text, record))
        keep_examples(block.source, result.documents)
        return result

    def _clean(self, number: int, text: str, record: dict[str, Any]) -> Document:
        rules = self.rules
        clean = text
        if rules.unicode:
            import ftfy

            clean = ftfy.fix_text(clean)
        repaired = clean != text
        spans = find_loops(clean, rules.loop_repeats, rules.loop_characters)
        loops, length = sum(end - begin for begin, end in spans), len(clean)
        clean = cut(clean, spans).strip()
        drop = self._judge(clean, loops / length if length else 0.0)
        perplexity = None
        if drop is None and self.perplexity is not None:
            perplexity = self.perplexity(clean)
            if perplexity > rules.max_perplexity:
                drop = Drop("max_perplexity", perplexity, rules.max_perplexity)
            elif perplexity < rules.min_perplexity:
                drop = Drop("min_perplexity", perplexity, rules.min_perplexity)
        return Document(
            number=number,
            start=clean[:80],
            before=len(text),
            after=len(clean),
            repaired=repaired,
            loops=loops,
            line=None
            if drop
            else json.dumps({**record, self.key: clean}, ensure_ascii=False, default=str).encode(errors="replace"),
            drop=drop,
            signature=None if drop else signature(clean, rules.near_duplicate > 0),
            perplexity=perplexity,
            texts=(text, clean),
        )

    def _judge(self, text: str, loops: float) -> Drop | None:
        """The first rule that the text breaks."""
        rules = self.rules
        if loops > rules.max_loops:
            return Drop("max_loops", loops, rules.max_loops)
        if len(text) < rules.min_characters:
            return Drop("min_characters", len(text), rules.min_characters)
        strange = len(_STRANGE.findall(text)) / len(text) if text else 0.0
        if strange > rules.max_replacement:
            return Drop("max_replacement", strange, rules.max_replacement)
        for name, share in repeated_shares(text).items():
            limit = getattr(rules, f"max_{name}")
            if share > limit:
                return Drop(f"max_{name}", share, limit)
        return None


def luck(source: str, number: int) -> bytes:
    """Orders documents at random, the same way in every run: the examples are those with the least."""
    return hashlib.blake2b(f"{source}\0{number}".encode(errors="replace"), digest_size=8).digest()


def keep_examples(source: str, documents: list[Document]) -> None:
    """Forget the texts of all but a few documents of each kind, which could be examples."""
    kinds: dict[str, list[tuple[bytes, int]]] = {}
    for i, document in enumerate(documents):
        if document.kind is not None:
            kinds.setdefault(document.kind, []).append((luck(source, document.number), i))
    chosen = {i for lot in kinds.values() for _, i in heapq.nsmallest(EXAMPLES, lot)}
    for i, document in enumerate(documents):
        if i not in chosen:
            document.texts = None


@dataclass(order=True)
class Example:
    luck: bytes
    where: str = field(compare=False)
    before: str = field(compare=False)
    after: str = field(compare=False)
    drop: Drop | None = field(compare=False)
    earlier: str | None = field(default=None, compare=False)  # the text that a duplicate is like


@dataclass
class Report:
    """What happened to a corpus. Counts of documents unless named otherwise."""

    rules: Rules
    inputs: list[str]
    output: str
    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    unreadable: int = 0
    repaired: int = 0
    looping: int = 0
    loop_characters: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_characters: Counter[str] = field(default_factory=Counter)
    perplexities: list[float] = field(default_factory=list)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def count(self, document: Document) -> None:
        self.documents += 1
        self.characters += document.before
        self.repaired += document.repaired
        self.looping += document.loops > 0
        self.loop_characters += document.loops
        if document.perplexity is not None:
            self.perplexities.append(document.perplexity)
        if document.drop is None:
            self.kept += 1
            self.kept_characters += document.after
        else:
            self.dropped[document.drop.rule] += 1
            self.dropped_characters[document.drop.rule] += document.before

    def show(self, kind: str, example: Example) -> None:
        lot = self.examples.setdefault(kind, [])
        lot.append(example)
        lot.sort()
        del lot[EXAMPLES:]

    def wants(self, kind: str, chance: bytes) -> bool:
        lot = self.examples.get(kind, [])
        return len(lot) < EXAMPLES or chance < lot[-1].luck

    def perplexity_quantiles(self) -> dict[str, float]:
        if not self.perplexities:
            return {}
        import numpy as np

        marks = [0, 5, 25, 50, 75, 90, 95, 98, 99, 100]
        return dict(zip(map(str, marks), np.percentile(self.perplexities, marks).round(3).tolist(), strict=True))

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            **{
                name: getattr(self, name)
                for name in (
                    *("inputs", "output", "documents", "characters", "kept", "kept_characters", "unreadable"),
                    *("repaired", "looping", "loop_characters"),
                )
            },
            "dropped": dict(sorted(self.dropped.items())),
            "dropped_characters": dict(sorted(self.dropped_characters.items())),
            "perplexity_percentiles": self.perplexity_quantiles(),
            "rules": {name: value for name, value in asdict(self.rules).items() if value != float("inf")},
        }


@dataclass(frozen=True)
class CleanJob:
    files: list[Path]
    output: Path
    report: Path  # folder
    key: str
    rules: Rules
    perplexity: Perplexity | None
    workers: int
    skip_bad: bool
    log_interval: int


def run_cleaning(job: CleanJob) -> Report:
    """Write the output and the report, both or neither. Raises BadRecord, DataError, SourceError, OSError."""
    if not job.output.name.endswith(OUTPUT_SUFFIXES):
        raise DataError(f"--output {job.output}: expected a name that ends in {', '.join(OUTPUT_SUFFIXES)}")
    if job.output.resolve() in [file.resolve() for file in job.files]:
        raise DataError(f"--output {job.output}: this is one of the inputs")
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.report.mkdir(parents=True, exist_ok=True)
    partial = job.output.with_name(f".partial.{job.output.name}")
    dropped = job.report / ".partial.dropped.jsonl"
    report = Report(job.rules, [str(file) for file in job.files], str(job.output))
    blocks = (block for file in job.files for block in read_blocks(file, [job.key]))
    try:
        with (
            _writer(partial) as out,
            dropped.open("w", encoding="utf-8") as log,
            contextlib.closing(in_order(Cleaner(job.rules, job.key, job.perplexity), blocks, job.workers)) as results,
        ):
            for line in _collect(job, report, results, log):
                out.write(line + b"\n")
        if not report.kept:
            raise DataError(f"nothing is left: {report.documents} documents, {dict(report.dropped)} dropped")
        _find_earlier(job, report)
        write_report(report, job.report)
        os.replace(dropped, job.report / "dropped.jsonl")
        os.replace(partial, job.output)
    except BaseException:
        partial.unlink(missing_ok=True)
        dropped.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            job.report.rmdir()  # if it is empty, this run made it
        raise
    return report


def _collect(job: CleanJob, report: Report, results: Iterator[Cleaned], log: IO[str]) -> Iterator[bytes]:
    """Lines for the output. Here, in the order of the corpus, duplicates are found and everything is counted."""
    index = Index(job.rules.exact_duplicate, job.rules.near_duplicate)
    places: list[tuple[str, str, int]] = []  # of the documents in the index
    start, next_report = time.monotonic(), job.log_interval
    for cleaned in results:
        for message in cleaned.bad:
            if not job.skip_bad:
                raise BadRecord(f"{message} (--on-bad-record skip leaves such records out and counts them)")
            if report.unreadable < MAX_SHOWN:
                print(f"skipped: {message}", file=sys.stderr)
            report.unreadable += 1
            log.write(json.dumps({"rule": "unreadable", "message": message}, ensure_ascii=False) + "\n")
        for document in cleaned.documents:
            line, where = document.line, f"{cleaned.source}, {cleaned.unit} {document.number}"
            chance = luck(cleaned.source, document.number)
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
        if report.documents >= next_report:
            next_report = report.documents + job.log_interval
            rate = report.characters / max(time.monotonic() - start, 1e-9) / 1e6
            print(f"{report.documents} documents, {report.kept} kept, {rate:.2f} million characters/s", file=sys.stderr)


def _find_earlier(job: CleanJob, report: Report) -> None:
    """Read the texts that the examples of duplicates are like once more, for the page."""
    wanted: dict[str, dict[int, list[Example]]] = {}
    for example in (example for lot in report.examples.values() for example in lot):
        if example.drop is not None and example.drop.like is not None:
            source, _, number = example.drop.like
            wanted.setdefault(source, {}).setdefault(number, []).append(example)
    for source, numbers in wanted.items():
        for block in read_blocks(Path(source), [job.key]):
            for number in sorted(numbers):
                if 0 <= number - block.first < len(block):
                    record = read_record(block, number - block.first)
                    for example in numbers.pop(number):
                        example.earlier = None if record is None else text_of(record, job.key)
            if not numbers:
                break


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[IO[bytes]]:
    """A file for writing, compressed as its name says. Equal content makes equal files."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as stream:
                yield stream  # type: ignore[misc]
        elif path.suffix == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise SourceError(f"{path}: writing .zst needs the package zstandard (pip install .[data])") from error
            with zstandard.ZstdCompressor(3).stream_writer(raw, closefd=False) as stream:
                yield stream
        else:
            yield raw
        raw.flush()
        os.fsync(raw.fileno())


def write_report(report: Report, folder: Path) -> None:
    """summary.json and page.html."""
    from tools.datasets.cleaning.page import page

    for name, text in (
        ("summary.json", json.dumps(report.summary(), indent=1, ensure_ascii=False) + "\n"),
        ("page.html", page(report)),
    ):
        aside = folder / f".partial.{name}"
        aside.write_text(text, encoding="utf-8", errors="replace")
        os.replace(aside, folder / name)
