"""The time of all micro-batches of a step through all stages, and the exposed part of reduction and gather.

DeepSpeed's 1F1B, and megatron-core's without virtual stages, follow a formula: the first micro-batch passes every stage
in both directions, and each further one waits for the longest stage; messages are exposed, and data-parallel
communication comes before and after. With virtual stages megatron-core's order is simulated
(`megatron.planner.cost.interleaved`): messages overlap with computation and, with `overlap_grad_reduce` and
`overlap_param_gather`, so does each chunk's data-parallel communication with the computation of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.layout import LlamaShape
from megatron.planner.cost import traffic
from megatron.planner.cost.interleaved import Simulation, simulate
from megatron.planner.cost.machines import Machine
from megatron.planner.cost.parallel_layout import ParallelLayout


@dataclass(frozen=True)
class ChunkTime:
    """One micro-batch through a rank's run of layers, in seconds without messages; without virtual stages the run is
    the whole stage."""

    parameters: float  # of one rank
    forward: float
    backward: float  # including recomputation and adding to the fp32 gradients

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class PipelineTime:
    """Seconds of a step, seen from its longest stage."""

    computing: float  # all micro-batches, one after the other
    bubble: float  # waiting because other stages compute
    messages: float  # waiting for messages
    reduction: float  # exposed reduction of gradients
    gather: float  # exposed gather of weights
    hidden: float = 0.0  # hidden part of both


def formula_time(
    layout: ParallelLayout, machine: Machine, chunks: Sequence[ChunkTime], messages: Sequence[float]
) -> PipelineTime:
    """Time without virtual stages; `messages` are each stage's seconds for one micro-batch."""
    steps = layout.num_micro_batches
    times = [chunk.total + waited for chunk, waited in zip(chunks, messages, strict=True)]
    longest = max(range(len(times)), key=times.__getitem__)
    parameters = max(chunk.parameters for chunk in chunks)
    reduction, gather = reduction_and_gather(parameters, layout, machine)
    return PipelineTime(
        computing=steps * chunks[longest].total,
        bubble=sum(times) - times[longest],
        messages=steps * messages[longest],
        reduction=reduction,
        gather=gather,
    )


def reduction_and_gather(parameters: float, layout: ParallelLayout, machine: Machine) -> tuple[float, float]:
    """Seconds, without any overlap, to reduce all gradients and to gather all weights."""
    by_engine = traffic.scatter_seconds if layout.engine == "megatron" else traffic.reduction_seconds
    return by_engine(parameters, layout, machine), traffic.gather_seconds(parameters, layout, machine)


def simulated_time(
    shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine, chunks: Sequence[ChunkTime]
) -> PipelineTime:
    """Time with virtual stages; `chunks` is in the model's order."""
    pipe, virtual, steps = layout.pipe, layout.virtual_stages, layout.num_micro_batches
    forward, backward = [chunk.forward for chunk in chunks], [chunk.backward for chunk in chunks]
    size = traffic.message_bytes(shape, layout, seq_length)
    sending = [size / traffic.boundary_rate(rank, layout, machine) for rank in range(pipe - 1)]
    sending.append(size / traffic.wrap_rate(layout, machine))

    by_size = {size: reduction_and_gather(size, layout, machine) for size in {chunk.parameters for chunk in chunks}}
    costs = [by_size[chunk.parameters] for chunk in chunks]
    by_rank = [[costs[chunk * pipe + rank] for chunk in range(virtual)] for rank in range(pipe)]
    ready = [_gathered([gather for _, gather in rank]) for rank in by_rank] if layout.overlap_param_gather else None

    whole = [max(sum(pair[which] for pair in rank) for rank in by_rank) for which in (0, 1)]
    alone = simulate(pipe, virtual, steps, forward, backward)
    found = simulate(pipe, virtual, steps, forward, backward, sending, ready)
    waited = max(0.0, found.seconds - alone.seconds)
    # nothing can be computed before the first chunk's weights have arrived; the others' are rarely late
    gather = whole[1] if ready is None else min(waited, ready[0][0])
    reduction = _exposed_reduction(found, by_rank) if layout.overlap_grad_reduce else whole[0]
    return PipelineTime(
        computing=max(found.busy),
        bubble=alone.seconds - max(found.busy),
        messages=waited - (0.0 if ready is None else gather),
        reduction=reduction,
        gather=gather,
        hidden=sum(whole) - reduction - gather,
    )


def _gathered(seconds: Sequence[float]) -> list[float]:
    """When the weights of each of a rank's chunks have arrived; they are gathered in order from the step's start."""
    ready, now = [], 0.0
    for one in seconds:
        now += one
        ready.append(now)
    return ready


def _exposed_reduction(found: Simulation, by_rank: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Seconds from the last pass of the step to the end of the last reduce-scatter on any rank.

    A chunk's reduce-scatter begins after its last backward pass; a rank runs them in sequence, the last chunk's first.
    """
    latest = 0.0
    for left, costs in zip(found.left, by_rank, strict=True):
        now = -max(left)
        for chunk in reversed(range(len(costs))):
            now = max(now, -left[chunk]) + costs[chunk][0]
        latest = max(latest, now)
    return latest
