"""`python deepy.py train.py CONFIG ... --dry-run`: the plan of a run, without hardware and without data."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import TYPE_CHECKING

from megatron.common.imports import slow_imports
from megatron.common.picture_files import check_picture_file
from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.planner.cost.machines import GIB
from megatron.planner.front import report
from megatron.planner.front.options import PlanOptions
from megatron.planner.plan import Plan, find_machine, make_plan, refusal

if TYPE_CHECKING:
    from megatron.planner.search import SearchResult

FITS, REFUSED = 0, 2


def dry_run(args: NeoXArgs, options: PlanOptions) -> int:
    """Print the plan of a resolved training configuration; the exit code is 2 if it cannot fit.

    Raises ConfigError for invalid options.
    """
    machine = find_machine(options.machine)
    usable = None if options.usable_gib is None else int(options.usable_gib * GIB)
    if options.picture is not None:
        check_picture_file(options.picture, ConfigError)
    layers, parameters = _true_model(args)
    plan = make_plan(args, layers, parameters, machine, usable, options.token_budget)
    found = _search(plan) if options.search else None
    if options.json:
        searched = {} if found is None else {"search": found.as_json()}
        print(json.dumps(plan.as_json() | searched, indent=1))
    else:
        print(report.text(plan), end="")
        if found is not None:
            ranks, batch = plan.layout.world_size, plan.layout.global_batch
            print(f"\nall layouts of {ranks:,} ranks and {batch:,} sequences a step:\n" + "\n".join(found.lines()))
    if options.picture is not None:
        from megatron.planner.front.picture import draw_plan

        draw_plan(plan, options.picture)
        print(f"picture: {options.picture}", file=sys.stderr)
    if plan.fits:
        return FITS
    print(f"deepy.py: {refusal(plan)}", file=sys.stderr)
    return FITS if options.allow_memory else REFUSED


def _true_model(args: NeoXArgs) -> tuple[list[range], int]:
    """Layers of every virtual stage, in the model's order, and the total parameters of the model that the trainer would
    build."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # nothing is allocated, and a GPU of this machine is not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional libraries of megatron-core
        with slow_imports():
            from megatron.planner.cost.stages import true_stages

        stages = true_stages(args)
    chunks = [stage.chunks[number] for number in range(args.virtual_pipe_parallel_size) for stage in stages]
    return chunks, sum(stage.parameters_total for stage in stages)


def _search(plan: Plan) -> SearchResult:
    """The layouts of the run's ranks and global batch, ranked."""
    from megatron.planner.search import search

    args = plan.args
    try:
        return search(
            args.whole_shape,
            plan.layout.world_size,
            plan.layout.global_batch,
            args.seq_length,
            plan.machine,
            precision=args.precision,
            usable_bytes=plan.usable_bytes,
            vocab_divisible_by=args.make_vocab_size_divisible_by,
            isolate_documents=args.isolate_documents,
        )
    except ValueError as error:
        raise ConfigError(f"--search: {error}") from None
