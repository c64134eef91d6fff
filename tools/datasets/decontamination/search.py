"""The search of a corpus: a sample chooses the threshold, then all documents are searched in their order."""

from __future__ import annotations

import contextlib
import heapq
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.common.atomic_files import replacing
from megatron.data.indexed import DataError
from tools.datasets.cleaning.clean import check_output, writer
from tools.datasets.cleaning.cleaner import luck
from tools.datasets.decontamination.overlap import Overlap, QuestionIndex, excerpt
from tools.datasets.decontamination.threshold import ChosenThreshold, choose_threshold
from tools.datasets.encoding.pipeline import report_bad
from tools.datasets.encoding.progress import Progress
from tools.datasets.encoding.records import Block, InputFiles, RecordError, read_record, text_of
from tools.datasets.encoding.workers import in_order

SAMPLE = 4000  # documents used to choose the threshold
FEWEST = 2000
_LONGEST_EXCERPT = 2000


@dataclass(frozen=True)
class SearchJob:
    inputs: InputFiles
    index: QuestionIndex
    key: str
    report: Path  # contaminated.jsonl and summary.json are written there
    output: Path | None  # the corpus without contaminated documents
    threshold: float | None  # None: choose it
    workers: int


@dataclass
class Contamination:
    """The results of a search."""

    threshold: float
    chosen: ChosenThreshold | None
    documents: int = 0
    contaminated: int = 0
    unreadable: int = 0
    found: dict[int, int] = field(default_factory=dict)  # question -> documents
    best: dict[int, float] = field(default_factory=dict)  # question -> highest score


@dataclass(frozen=True)
class _Document:
    """`line` is the record for the output, empty if none is written; `entry` reports a contaminated document."""

    line: bytes
    overlaps: list[Overlap]
    entry: dict[str, Any] | None


@dataclass(frozen=True)
class _Searched:
    documents: list[_Document]
    bad: list[str]


def search_corpus(job: SearchJob) -> Contamination:
    """Write `contaminated.jsonl` and, if requested, the output; both or neither.

    Raises DataError, BadRecord, SourceError, OSError.
    """
    if job.output is not None:
        check_output(job.output, job.inputs)
    job.inputs.check([job.key])
    if job.threshold is None:
        chosen = _choose(job)
        result = Contamination(chosen.value, chosen)
    else:
        result = Contamination(job.threshold, None)
    job.report.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        log = files.enter_context(replacing(job.report / "contaminated.jsonl")).open("w", encoding="utf-8")
        files.enter_context(contextlib.closing(log))
        out = None
        if job.output is not None:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            out = files.enter_context(writer(files.enter_context(replacing(job.output)), job.output.suffix))
        for document in _search(job, result):
            if document.entry is not None:
                log.write(json.dumps(document.entry, ensure_ascii=False) + "\n")
            elif out is not None:
                out.write(document.line + b"\n")
    return result


def _choose(job: SearchJob) -> ChosenThreshold:
    documents = _sample(job)
    if len(documents) < FEWEST:
        raise DataError(
            f"{len(documents):,} documents are too few to choose a threshold that one in a thousand reaches by chance: "
            f"{FEWEST:,} are needed. Give --threshold, such as 0.45, and read what it finds"
        )
    return choose_threshold(job.index, documents)


def _sample(job: SearchJob) -> list[str]:
    """Texts of SAMPLE documents, chosen by a hash of their positions."""
    kept: list[tuple[int, str]] = []  # a heap with the highest hash on top
    for block in job.inputs.blocks([job.key], [job.key]):
        for position in range(len(block)):
            place = int.from_bytes(luck(block.source, block.first + position), "big")
            if len(kept) == SAMPLE and -place < kept[0][0]:
                continue  # most records are never parsed
            with contextlib.suppress(RecordError):
                record = read_record(block, position)
                if record is not None:
                    item = (-place, text_of(record, job.key))
                    (heapq.heappush if len(kept) < SAMPLE else heapq.heappushpop)(kept, item)
    return [text for _, text in sorted(kept)]


def _search(job: SearchJob, result: Contamination) -> Iterator[_Document]:
    """Yield every document in the order of the corpus, and count the findings."""
    progress = Progress(job.inputs.bytes)

    def look(block: Block) -> _Searched:
        return _search_block(job, block, result.threshold)

    blocks = job.inputs.blocks([job.key], None, progress)
    with contextlib.closing(in_order(look, blocks, job.workers)) as blocks_done:
        for searched in blocks_done:
            result.unreadable += report_bad(searched.bad, job.inputs.skip_bad, result.unreadable)
            for document in searched.documents:
                result.documents += 1
                result.contaminated += document.entry is not None
                for overlap in document.overlaps:
                    result.found[overlap.question] = result.found.get(overlap.question, 0) + 1
                    result.best[overlap.question] = max(result.best.get(overlap.question, 0), overlap.score)
                yield document
            if progress.due(result.documents):
                print(
                    f"{result.documents:,} documents, {result.contaminated:,} contaminated, {progress.left()}",
                    file=sys.stderr,
                    flush=True,
                )


def _search_block(job: SearchJob, block: Block, threshold: float) -> _Searched:
    searched = _Searched([], [])
    for position in range(len(block)):
        try:
            record = read_record(block, position)
            if record is None:
                continue
            text = text_of(record, job.key)
        except RecordError as error:
            searched.bad.append(f"{block.where(position)}: {error}")
            continue
        overlaps = job.index.find(text, threshold)
        entry = _entry(job.index, block, position, text, overlaps) if overlaps else None
        line = b"" if job.output is None or entry is not None else json.dumps(record, ensure_ascii=False).encode()
        searched.documents.append(_Document(line, overlaps, entry))
    return searched


def _entry(index: QuestionIndex, block: Block, position: int, text: str, overlaps: list[Overlap]) -> dict[str, Any]:
    return {
        "source": block.source,
        block.unit: block.first + position,
        "questions": [
            {
                "question": index.questions[overlap.question].name,
                "score": round(overlap.score, 4),
                "text": excerpt(text, overlap)[:_LONGEST_EXCERPT],
            }
            for overlap in overlaps
        ],
    }
