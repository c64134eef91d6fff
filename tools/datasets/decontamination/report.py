"""The results of a search, as lines of text and as summary.json."""

from __future__ import annotations

import json
from typing import Any

from megatron.common.atomic_files import write_bytes
from tools.datasets.decontamination.search import Contamination, SearchJob
from tools.datasets.decontamination.threshold import FALSE_POSITIVES, Proportion

_SHOWN = 10  # questions


def summary_lines(job: SearchJob, result: Contamination) -> list[str]:
    """Lines on the threshold and its quality, the findings, and questions that could not be searched for."""
    lines = []
    if result.chosen is None:
        lines.append(f"threshold {result.threshold:g}, as given")
    else:
        why = f"at most {FALSE_POSITIVES:.1%} of the documents used to choose it reach it"
        if result.chosen.limited:
            why = (
                "the highest that still finds damaged questions; too many documents reach it to be chance, so read them"
            )
        lines.append(f"threshold {result.threshold:g}: {why}")
        lines += [f"  found of planted questions, {way}: {share}" for way, share in result.chosen.recall.items()]
        lines.append(f"  other documents that reach it: {result.chosen.reached}")
    questions = job.index.questions
    lines.append(
        f"documents with questions: {result.contaminated:,} of {result.documents:,}; questions found: "
        f"{len(result.found):,} of {len(questions):,}; see {job.report}/contaminated.jsonl"
    )
    for number, count in sorted(result.found.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]:
        where = "document" if count == 1 else "documents"
        lines.append(f"  {questions[number].name}: in {count:,} {where}, highest score {result.best[number]:.2f}")
    if len(result.found) > _SHOWN:
        lines.append(f"  and {len(result.found) - _SHOWN:,} more questions")
    if job.index.unsearchable:
        names = ", ".join(questions[number].name for number in job.index.unsearchable[:_SHOWN])
        lines.append(f"{len(job.index.unsearchable):,} questions are too short to search for: {names}")
    if result.unreadable:
        lines.append(f"{result.unreadable:,} unreadable records were skipped")
    lines += job.inputs.describe_bad()
    if job.output is not None:
        lines.append(f"{job.output}: {result.documents - result.contaminated:,} documents")
    return lines


def write_summary(job: SearchJob, result: Contamination) -> None:
    questions = job.index.questions
    summary: dict[str, Any] = {
        "inputs": [str(file) for file in job.inputs.files],
        "left_out": list(job.inputs.bad.values()),
        "questions": len(questions),
        "too_short": [questions[number].name for number in job.index.unsearchable],
        "threshold": result.threshold,
        "documents": result.documents,
        "unreadable": result.unreadable,
        "contaminated": result.contaminated,
        "found": {
            questions[number].name: {"documents": count, "score": round(result.best[number], 4)}
            for number, count in sorted(result.found.items())
        },
    }
    if result.chosen is not None:
        summary["chosen"] = {
            "limited_by_plants": result.chosen.limited,
            "recall": {way: _json(share) for way, share in result.chosen.recall.items()},
            "documents_that_reach_it": _json(result.chosen.reached),
        }
    write_bytes(job.report / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False).encode() + b"\n")


def _json(share: Proportion) -> dict[str, Any]:
    low, high = share.interval
    return {"hits": share.hits, "cases": share.cases, "low": round(low, 6), "high": round(high, 6)}
