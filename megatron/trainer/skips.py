"""What a run leaves out: updates whose loss or gradient is not finite, and samples that an operator has taken out.

DeepSpeed's two ZeRO-1 optimizers compute the norm of all ranks' gradients before they touch anything, and leave
weights, moments and step count as they are where it is not finite (the loss sees to it that this is so when the loss
itself is not, `megatron.model.loss`). Here such steps are counted and, past a bound, end the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.checkpoint import TrainState
from megatron.data.skip_ranges import SampleRanges
from megatron.neox_arguments import NeoXArgs
from megatron.trainer.nonfinite import SuspiciousLossError


class SkipLimitError(SuspiciousLossError):
    """More optimizer steps had a loss or gradient that is not finite than the configuration allows."""


def was_skipped(engine: PipelineEngine) -> bool:
    """Whether the engine left the weights as they were in the step it has just done; the same on all ranks."""
    return not engine.was_step_applied()


def count_skipped(
    engine: PipelineEngine, args: NeoXArgs, state: TrainState, loss: float, samples: tuple[int, int]
) -> str:
    """Account for a skipped step on `samples` [first, end); returns the line for the log. Collective.

    `state` is still before the step. Raises SkipLimitError on all ranks when there are too many.
    """
    state.skipped_in_a_row += 1
    in_a_row, in_all = state.skipped_in_a_row, engine.skipped_steps  # the engine's count is in its checkpoint
    what = (
        f"iteration {state.iteration + 1}: loss {loss}, gradient norm not finite ({_blame(engine)}); its samples are "
        f"[{samples[0]}, {samples[1]})"
    )
    if in_a_row > args.max_skipped_steps_in_a_row or in_all > args.max_skipped_steps:
        raise SkipLimitError(
            f"{what}. The update is not applied, and the run stops: it is the {in_a_row}. in a row (at most "
            f"{args.max_skipped_steps_in_a_row} are skipped, max_skipped_steps_in_a_row) and the {in_all}. in all (at "
            f"most {args.max_skipped_steps}, max_skipped_steps). If the data are to blame, go on from the last "
            f"checkpoint with skip_sample_ranges; if always the same replica, exclude its node; else lower the "
            f"learning rate"
        )
    return (
        f"{what}. The update is skipped, weights and optimizer stay as they were; {in_a_row} in a row, {in_all} in all"
    )


def _blame(engine: PipelineEngine) -> str:
    """Which data-parallel replicas computed a loss that is not finite. Collective."""
    mine = None
    if engine.is_last_stage() and not math.isfinite(float(engine.total_loss)):
        mine = engine.grid.data_parallel_id
    told: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    replicas = sorted({replica for replica in told if replica is not None})
    if not replicas:
        return "every replica's loss is finite: it arose in the backward pass"
    of = f"of {engine.grid.data_parallel_size} data-parallel replicas"
    return f"not finite in replica {', '.join(map(str, replicas))} {of}"


def announce(ranges: SampleRanges, position: int, log: Callable[[str], None]) -> None:
    """At the start: which ranges lie ahead of the run's position, and which do not matter any more."""
    for first, end in ranges.ranges:
        if end <= position:
            log(f"skip_sample_ranges: [{first}, {end}) lies behind position {position} and changes nothing")
        else:
            log(f"skip_sample_ranges: [{max(first, position)}, {end}) lies ahead, its samples will be left out")


def crossed(ranges: SampleRanges, position: int, behind: int) -> list[str]:
    """A line for each range that a step from `position` to `behind` has left out."""
    return [
        f"skip_sample_ranges: {end - first} samples left out, [{first}, {end})"
        for first, end in ranges.between(position, behind)
    ]
