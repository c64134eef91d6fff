"""A page of one or several runs.

    python tools/report RUN_DIR [RUN_DIR ...] [--output FOLDER]

A run is a folder with one `metrics.jsonl` or several (its stages, in the order in which they began), or such a file.
Beside them are read, where they are there: `starts.jsonl` (what trained, on what), `summary.json` of mcq.py, of
clean_corpus.py and of decontaminate.py. The page holds everything in one file; each figure lies beside it as a PNG.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.common.boundary import guarded
from megatron.common.errors import UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="tools/report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="a run's folder, or its metrics.jsonl")
    p.add_argument("--output", type=Path, help="folder for page.html and the PNGs (default: RUN_DIR/report)")
    p.add_argument("--title", default="Training report")
    p.add_argument(
        "--topic", help="accuracy in the last figure: that of this topic of mcq.py's questions (default: of all)"
    )
    p.add_argument(
        "--price-per-hour",
        type=float,
        help="in USD, of the machine that answered: the last figure's cost (default: machine-hours)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return guarded("tools/report", lambda: make(options))


def make(options: argparse.Namespace) -> int:
    """Read the runs, draw, and write; the page comes last."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("matplotlib is missing, which draws the figures; pip install .[examples]") from None
    from tools.report.figures import draw_all
    from tools.report.page import write_page
    from tools.report.runs import read_run

    if options.price_per_hour is not None and not options.price_per_hour > 0:
        raise UserError(f"--price-per-hour {options.price_per_hour:g}: expected a price above 0")
    first: Path = options.runs[0]
    output: Path = options.output or (first.parent if first.is_file() else first) / "report"
    runs = [read_run(path, leave_out=output) for path in options.runs]
    output.mkdir(parents=True, exist_ok=True)
    figures = draw_all(runs, output, topic=options.topic, price_per_hour=options.price_per_hour)
    page = write_page(runs, figures, output, options.title)
    for run in runs:
        for stage in run.stages:
            print(f"{stage.path}: steps {stage.first} to {stage.last}")
            for line in stage.problems:
                print(f"  warning: {line}")
        for line in run.problems:
            print(f"  warning: {line}")
    print(f"written to {output}: {page.name}, {', '.join(figure.path.name for figure in figures)}")
    return 0
