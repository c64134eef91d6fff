"""Find the questions of a benchmark in a corpus and, on request, remove the documents that contain them.

    python tools/datasets/decontaminate.py --benchmark questions.jsonl --input papers.jsonl.zst --report contamination

Questions are found verbatim, with OCR errors, with shuffled options, and without options. The score of a question in a
document is the fraction of its short letter sequences found in one place, weighted by how rare they are among the
questions. The threshold is chosen on half of a set of questions planted into documents of the corpus, so that at most
one document in a thousand reaches it by chance; the report gives the recall on the other half, with intervals.

The folder `--report` gets `contaminated.jsonl` (document, questions, scores, the matching text) and `summary.json`;
with `--output`, the corpus is written without those documents.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--benchmark",
        nargs="+",
        required=True,
        help="files of questions: .jsonl, .json, .parquet or .csv, with options",
    )
    p.add_argument("--input", nargs="+", required=True, help="the corpus, as in clean_corpus.py")
    p.add_argument("--report", type=Path, required=True, help="folder of the report")
    p.add_argument("--output", type=Path, help="the corpus without contaminated documents (.jsonl, .jsonl.gz or .zst)")
    p.add_argument("--text-key", default="text", help="the field to search")
    p.add_argument("--threshold", type=float, help="minimum score of a contaminated document (default: chosen)")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    p.add_argument(
        "--on-bad-record",
        choices=["fatal", "skip"],
        default="fatal",
        help="stop at an unreadable record, or skip and count it",
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded("decontaminate.py", lambda: decontaminate(options), "stopped; nothing was written")


def decontaminate(options: argparse.Namespace) -> None:
    """Run the search. Raises UserError or OSError; outputs are either complete or absent."""
    from megatron.data.indexed import DataError
    from tools.datasets.decontamination.benchmark import read_benchmark
    from tools.datasets.decontamination.overlap import QuestionIndex
    from tools.datasets.decontamination.report import summary_lines, write_summary
    from tools.datasets.decontamination.search import SearchJob, search_corpus
    from tools.datasets.encoding.records import find_inputs

    if options.threshold is not None and not 0.3 <= options.threshold <= 1:
        raise DataError(f"--threshold {options.threshold:g}: expected 0.3 to 1")
    index = QuestionIndex(read_benchmark(options.benchmark))
    if len(index.unsearchable) == len(index.questions):
        raise DataError("no question is long enough to search for: each has fewer than 24 letters and digits")
    job = SearchJob(
        inputs=find_inputs(options.input, options.on_bad_record == "skip"),
        index=index,
        key=options.text_key,
        report=options.report,
        output=options.output,
        threshold=options.threshold,
        workers=options.workers,
    )
    result = search_corpus(job)
    write_summary(job, result)
    print("\n".join(summary_lines(job, result)))


if __name__ == "__main__":
    sys.exit(main())
