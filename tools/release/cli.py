"""Make and verify releases.

    python tools/release make RECIPE.yml --output FOLDER
    python tools/release verify FOLDER [--data FOLDER ...] [--steps N]
    python tools/release step FOLDER --stage NAME --step N --data FOLDER [--data FOLDER ...]

`make` writes the weights in Hugging Face format, a model card, and `provenance.json`: every file's SHA-256, each
stage's configuration, the data with their hashes and licenses, and the content of every step. `verify` checks all of it
on another machine; given the data, it rereads steps and compares token ids and documents, byte for byte. `step` shows
the content of one step. Exit code of `verify`: 0, or 1 with a list of everything that is missing or was changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.common.boundary import guarded


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python tools/release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = p.add_subparsers(title="verbs", required=True, metavar="VERB", dest="verb")
    made = verbs.add_parser("make", help="write a release")
    made.add_argument("recipe", type=Path, help="recipe of the release; docs/releasing.md lists the keys")
    made.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet")
    checked = verbs.add_parser("verify", help="check a release, and its data if available")
    checked.add_argument("release", type=Path)
    checked.add_argument("--data", type=Path, nargs="+", default=[], help="folders with the .bin, .idx and .json files")
    checked.add_argument("--steps", type=int, default=20, help="steps of each stage to reread (default: 20)")
    checked.add_argument("--seed", type=int, default=0, help="seed that selects the steps (default: 0)")
    shown = verbs.add_parser("step", help="show the documents of a step")
    shown.add_argument("release", type=Path)
    shown.add_argument("--stage", required=True)
    shown.add_argument("--step", type=int, required=True, help="counted from 1, as in the log")
    shown.add_argument("--data", type=Path, nargs="+", required=True)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return guarded("tools/release", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.verb == "make":
        from tools.release.make import make_release

        for line in make_release(options.recipe, options.output):
            print(line)
        return 0
    from tools.release.verify import show_step, verify_release

    if options.verb == "step":
        for line in show_step(options.release, options.stage, options.step, options.data):
            print(line)
        return 0
    checks, problems = verify_release(options.release, options.data, options.steps, options.seed)
    for line in checks:
        print(line)
    for line in problems:
        print(f"problem: {line}")
    print(f"{len(problems)} problems" if problems else "complete and unchanged since the release")
    return 1 if problems else 0
