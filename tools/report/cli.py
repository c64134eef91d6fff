"""Report one or several runs on a single page.

    python tools/report RUN_DIR [RUN_DIR ...] [--output FOLDER]

A run is a folder with one or more `metrics.jsonl` (one per stage, in order of their start), or a single such file.
Also read if present: `starts.jsonl` (configuration and machine of each start), and `summary.json` of mcq.py,
clean_corpus.py and decontaminate.py. The page is a single file; each figure is also written as a PNG.
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
    p.add_argument("--topic", help="show accuracy on this topic of mcq.py's questions in Figure 3 (default: on all)")
    p.add_argument(
        "--price-per-hour",
        type=float,
        help="price of the machine that ran mcq.py, in USD, for Figure 3 (default: cost in machine-hours)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return guarded("tools/report", lambda: make(options))


def make(options: argparse.Namespace) -> int:
    """Read the runs, draw the figures, then write the page. Returns the exit code."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the figures need matplotlib; pip install .[examples]") from None
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
