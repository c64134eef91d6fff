"""Evaluate a model's vectors: `halves` and `retrieval` for texts, `properties` for anything with vectors and labels."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.common.atomic_files import write_text
from megatron.common.boundary import guarded
from megatron.common.picture_files import check_picture_file
from tools.probe.errors import ProbeError


def main(arguments: Sequence[str]) -> int:
    """Run `python -m tools.probe ARGUMENTS` and return its exit code."""
    given = _parser().parse_args(arguments)
    return guarded("probe", lambda: given.run(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.probe", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    halves = commands.add_parser("halves", help="cut every document into two texts, for embed.py")
    halves.add_argument("documents", type=Path, help=".jsonl or .parquet")
    halves.add_argument("output", type=Path, help="texts ID#1 and ID#2, as JSON lines")
    halves.add_argument("--text-field", default="text")
    halves.add_argument("--id-field", default="id")
    halves.add_argument("--min-words", type=int, default=20, help="leave out shorter documents (default: 20)")
    halves.add_argument("--limit", type=int, help="stop after this many documents")
    halves.set_defaults(run=_halves)

    retrieval = commands.add_parser("retrieval", help="do the halves of documents find each other?")
    retrieval.add_argument("models", nargs="+", metavar="NAME=VECTORS", help="vectors of the halves; the base first")
    retrieval.add_argument("--output", type=Path, required=True, help="the report, as JSON")
    retrieval.add_argument("--picture", type=Path, help="histograms, as .png, .svg or .pdf")
    retrieval.add_argument("--sample", type=int, default=5000, help="documents to draw if more (default: 5000)")
    retrieval.add_argument("--seed", type=int, default=0)
    retrieval.set_defaults(run=_retrieval)

    properties = commands.add_parser("properties", help="linear probes of properties, layer by layer")
    properties.add_argument("--trained", type=Path, required=True, metavar="VECTORS", help="vectors after training")
    properties.add_argument(
        "--untrained", type=Path, metavar="VECTORS", help="vectors of the same model before training"
    )
    properties.add_argument(
        "--inputs",
        type=Path,
        help="baseline inputs: texts (.jsonl, .parquet), arrays (.npy), or the prefix of .bin/.idx images",
    )
    properties.add_argument("--checkpoints", nargs="+", default=[], metavar="NAME=VECTORS", help="in training order")
    properties.add_argument("--labels", type=Path, required=True, help="table with ids: .csv, .jsonl or .parquet")
    properties.add_argument("--targets", nargs="+", default=[], metavar="COLUMN", help="numeric columns: ridge, R2")
    properties.add_argument("--classes", nargs="+", default=[], metavar="COLUMN", help="classes: logistic, accuracy")
    properties.add_argument("--id-field", default="id", help="column of the ids (default: id)")
    properties.add_argument("--label-counts", nargs="+", type=int, default=[], help="also fit to this many labels")
    properties.add_argument("--repeats", type=int, default=5, help="random subsets per label count (default: 5)")
    properties.add_argument("--test-share", type=float, default=0.25, help="share of test items (default: 0.25)")
    properties.add_argument("--draws", type=int, default=1000, help="bootstrap resamples (default: 1000)")
    properties.add_argument("--seed", type=int, default=0)
    properties.add_argument("--output", type=Path, required=True, help="the report, as JSON")
    properties.add_argument("--picture", type=Path, help="scores and curves, as .png, .svg or .pdf")
    properties.set_defaults(run=_properties)
    return parser


def _halves(given: argparse.Namespace) -> int:
    from tools.probe.halves import write_halves

    written, shorter = write_halves(
        given.documents,
        given.output,
        text_field=given.text_field,
        id_field=given.id_field,
        min_words=given.min_words,
        limit=given.limit,
    )
    print(f"cut {written} documents into halves; left out {shorter} with fewer than {given.min_words} words")
    print(f"written to {given.output}")
    return 0


def _retrieval(given: argparse.Namespace) -> int:
    from tools.probe.features import read_features
    from tools.probe.pictures import draw_retrieval
    from tools.probe.retrieval import lines_of_retrieval, retrieval_report

    if given.picture is not None:
        check_picture_file(given.picture, ProbeError)
    if given.sample < 2:
        raise ProbeError(f"--sample {given.sample}: expected at least 2 documents")
    models = {name: read_features(path) for name, path in _named(given.models).items()}
    report = retrieval_report(models, given.sample, given.seed)
    print("\n".join(lines_of_retrieval(report)))
    _write(report, given.output, given.picture, draw_retrieval)
    return 0


def _properties(given: argparse.Namespace) -> int:
    from tools.probe.features import read_features
    from tools.probe.inputs import read_inputs
    from tools.probe.labels import read_properties
    from tools.probe.pictures import draw_study
    from tools.probe.study import Study, StudyOptions
    from tools.probe.tables import lines_of_study

    if importlib.util.find_spec("sklearn") is None:
        raise ProbeError("probes need scikit-learn; pip install .[examples]")
    if given.picture is not None:
        check_picture_file(given.picture, ProbeError)
    if not given.targets and not given.classes:
        raise ProbeError("nothing to probe: give --targets (columns of numbers) or --classes (columns of classes)")
    if not 0 < given.test_share < 1:
        raise ProbeError(f"--test-share {given.test_share:g}: expected a share between 0 and 1")
    study = Study(
        read_properties(given.labels, given.targets, given.classes, given.id_field),
        read_features(given.trained),
        None if given.untrained is None else read_features(given.untrained),
        None if given.inputs is None else read_inputs(given.inputs),
        {name: read_features(path) for name, path in _named(given.checkpoints).items()},
    )
    options = StudyOptions(given.test_share, given.seed, given.draws, tuple(given.label_counts), given.repeats)
    report = study.run(options)
    print("\n".join(lines_of_study(report)))
    _write(report, given.output, given.picture, draw_study)
    return 0


def _named(words: Sequence[str]) -> dict[str, Path]:
    """Parse `NAME=FILE` words. Raises ProbeError for a malformed or repeated one."""
    named: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise ProbeError(f"{word}: expected NAME=FILE, such as base=vectors/base.npy")
        if name in named:
            raise ProbeError(f"{name} is given twice")
        named[name] = Path(path)
    return named


def _write(
    report: Mapping[str, Any], path: Path, picture: Path | None, draw: Callable[[Mapping[str, Any], Path], None]
) -> None:
    """Write the report and, if requested, its picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    if picture is not None:
        draw(report, picture)
        print(f"written to {picture}")
