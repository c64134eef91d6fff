"""Clean a corpus: repair Unicode, cut loops, drop broken, noisy and duplicate documents, and report every change.

    python tools/datasets/clean_corpus.py --input papers.jsonl.zst --output data/papers_clean.jsonl.zst

Input is JSON lines or JSON lists (plain, .gz, .zst), Parquet or plain text; commas, globs and folders are accepted.
The output is JSON lines (plain, .gz or .zst) with the same fields; records from a folder get the name of their file as
`file`. The report in `papers_clean_report/` has `page.html` for reading, `summary.json`, and `dropped.jsonl` with every
document that is not in the output, the rule that dropped it, the measured value and the limit. The result is the same
for any number of workers; a run that fails or is killed leaves an existing output unchanged.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parser() -> argparse.ArgumentParser:
    from tools.datasets.cleaning.rules import add_flags

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, help="files, globs or folders, also separated by commas")
    p.add_argument("--output", type=Path, required=True, help="a name ending in .jsonl, .jsonl.gz or .jsonl.zst")
    p.add_argument("--report", type=Path, help="folder of the report (default: OUTPUT without its suffix + _report)")
    p.add_argument("--text-key", default="text", help="the field to clean")
    p.add_argument("--perplexity-model", type=Path, help="a KenLM n-gram, or a Hugging Face model folder")
    p.add_argument("--rules", type=Path, help="YAML file with lines `rule: threshold`; flags take precedence")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    p.add_argument("--log-interval", type=int, help="documents between progress lines (default: one every ten seconds)")
    p.add_argument(
        "--on-bad-record",
        choices=["fatal", "skip"],
        default="fatal",
        help="stop at an unreadable file or record, or skip and count it",
    )
    add_flags(p)
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded("clean_corpus.py", lambda: clean(options), "stopped; nothing was written")


def clean(options: argparse.Namespace) -> None:
    """Run the cleaning. Raises UserError, OSError."""
    from megatron.data.indexed import DataError
    from tools.datasets.cleaning.clean import CleaningJob, run_cleaning
    from tools.datasets.cleaning.page import report_table
    from tools.datasets.cleaning.perplexity import load_perplexity
    from tools.datasets.cleaning.rules import read_rules
    from tools.datasets.encoding.records import find_inputs

    rules = read_rules(options.rules, options)
    limited = rules.max_perplexity != float("inf") or rules.min_perplexity > 0
    if limited and options.perplexity_model is None:
        raise DataError("a limit on perplexity needs --perplexity-model")
    name = options.output.name.removesuffix(".gz").removesuffix(".zst").removesuffix(".jsonl")
    folder = options.report or options.output.with_name(f"{name}_report")
    inputs = find_inputs(options.input, options.on_bad_record == "skip")
    report = run_cleaning(
        CleaningJob(
            inputs=inputs,
            output=options.output,
            report=folder,
            key=options.text_key,
            rules=rules,
            perplexity=load_perplexity(options.perplexity_model) if options.perplexity_model else None,
            workers=options.workers,
            log_interval=options.log_interval,
        )
    )
    print(f"{report_table(report)}\n{options.output}: {report.kept} documents; {folder}/page.html shows the changes")
    for line in inputs.describe_bad():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
