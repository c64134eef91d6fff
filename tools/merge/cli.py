"""The command line: `python tools/merge merge.yml --output DIR`."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.common.boundary import guarded_from_sigterm
from megatron.common.errors import UserError
from megatron.common.picture_files import check_picture_file
from megatron.common.quantity import quantity

from ..convert_hf.cli import progress_bar, share, size
from .errors import MergeError

if TYPE_CHECKING:
    from .job import MergeJob


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 `--verify` found a difference, 2 bad input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    again = "interrupted; the same command with --resume continues"
    return guarded_from_sigterm("merge", lambda: _run(arguments), again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/merge",
        description="Merge Llama models of the same shape, tile by tile, with identical bits on every machine. Reads "
        "mergekit's YAML for linear, task_arithmetic, ties, dare_linear, dare_ties and slerp, and averages the "
        "checkpoints of a run.",
    )
    parser.add_argument("recipe", type=Path, metavar="merge.yml", help="the models to merge, and the method")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, metavar="DIR", help="the folder to write; appears when complete")
    what.add_argument("--verify", type=Path, metavar="DIR", help="repeat the merge and compare it with this folder")
    parser.add_argument(
        "--tp", type=int, metavar="N", help="write NeoX layer files for N ranks (default: Hugging Face)"
    )
    parser.add_argument("--vocab-divisible-by", type=int, metavar="M", help="with --tp, as in convert_hf")
    parser.add_argument("--shard-size", type=size, metavar="SIZE", help="largest safetensors file, such as 5GB")
    parser.add_argument("--max-ram", type=size, default=1 << 30, metavar="SIZE", help="memory limit (default 1GiB)")
    parser.add_argument("--threads", type=int, default=4, metavar="N", help="merging threads (default 4)")
    parser.add_argument(
        "--shard", type=share, default=(1, 1), metavar="i/n", help="do share i of n; run one share on each of n hosts"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted merge")
    parser.add_argument("--force", action="store_true", help="replace a finished or interrupted output of this command")
    parser.add_argument("--plan", action="store_true", help="check everything, print the job and stop")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the report (.png, .svg, .pdf; matplotlib)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from .job import MergeJob, MergeRequest
    from .recipe_file import read_recipe

    if arguments.picture is not None:
        check_picture_file(arguments.picture, MergeError)
    if arguments.verify is not None and arguments.tp is not None:
        raise UserError("--verify detects the format of its folder; leave --tp out")
    recipe = read_recipe(arguments.recipe)
    request = MergeRequest(
        output=arguments.output or arguments.verify,
        tp=arguments.tp,
        divisible_by=arguments.vocab_divisible_by,
        shard_size=arguments.shard_size,
        max_ram=arguments.max_ram,
        threads=arguments.threads,
        shard=arguments.shard,
        resume=arguments.resume,
        force=arguments.force,
        command=_portable_command(arguments),
    )
    job = MergeJob(recipe, request)
    _introduce(job)
    if arguments.plan:
        if arguments.output is not None:
            job.check_output()
        return 0
    return _verify(job, arguments) if arguments.verify is not None else _merge(job, arguments)


def _portable_command(arguments: argparse.Namespace) -> str:
    """The command for the card: options that affect the output, without folders of this machine."""
    output = arguments.output or arguments.verify
    words = ["python", "tools/merge", arguments.recipe.name, "--output", Path(os.path.abspath(output)).name]
    for name in ("tp", "vocab_divisible_by", "shard_size"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _introduce(job: MergeJob) -> None:
    from .recipe import DARE

    recipe = job.recipe
    for note in job.notes:
        print(f"note: {note}")
    for parent in job.parents.values():
        print(f"{parent.label}: {parent.checkpoint.describe()}" + (" with an adapter" if parent.adapter else ""))
    if recipe.method != "slerp":
        weights = job.final_norm_weights()
        shown = ", ".join(f"{m.parent.label} {w:g}" for m, w in zip(recipe.models, weights, strict=True))
        method = f"{recipe.method}, seed {recipe.seed}" if recipe.method in DARE else recipe.method
        print(f"{method}; weights of the final norm: {shown}, sum {sum(weights):g}")
    print(f"tokenizer and configuration: {job.side.label}")
    print(
        f"reads {job.bytes_read:,} bytes, writes {sum(f.size for f in job.output.plan.files):,} bytes in "
        f"{quantity(len(job.output.plan.files), 'weight file')}; {quantity(job.threads, 'thread')}, bands of "
        f"{job.band >> 10} KiB"
    )


def _merge(job: MergeJob, arguments: argparse.Namespace) -> int:
    from .recipe import DARE
    from .report import text_table

    start = time.monotonic()
    with progress_bar(job.work(), arguments.quiet) as progress:
        done = job.run(progress)
    seconds = time.monotonic() - start
    written = job.output.plan.bytes_written
    rate = f"{written:,} bytes in {seconds:.1f} s ({written / max(seconds, 1e-3) / 1e9:.2f} GB/s)"
    if not done:
        share_, count = job.request.shard
        print(f"share {share_}/{count} is written, {rate}; {job.output.final} appears when all shares are done")
        return 0
    if job.report is not None:  # None where another host completed the folder
        print(text_table(job.report))
        for warning in job.report.warnings(job.recipe.method in DARE):
            print(f"warning: {warning}")
        if arguments.picture is not None:
            from .picture import draw_report

            draw_report(job.report, arguments.picture)
    print(f"wrote {job.output.final}: {quantity(len(job.output.plan.files), 'weight file')}, {rate}")
    return 0


def _verify(job: MergeJob, arguments: argparse.Namespace) -> int:
    from .verify import verify_merge

    names = sorted(job.merged.tensors)
    total = job.work(names)
    with progress_bar(total, arguments.quiet) as progress:
        lines = verify_merge(job, arguments.verify, progress)
    print("\n".join(lines or [f"all {len(names)} tensors match the recipe"]))
    print("DIFFERENT" if lines else "EQUAL")
    return 1 if lines else 0
