"""The time of a layout: one training step, predicted without hardware.

    estimate(shape, layout, seq_length, machine) -> Estimate

Pure arithmetic on the model's sizes (`compute`), on the communication between ranks (`traffic`) and on one machine's
constants (`machines`); no torch. Assumes bf16 and 1F1B. DeepSpeed's pipeline engine overlaps no communication except
tensor-parallel collectives during a matrix product (`hideable_seconds`), megatron-core's as described in
`pipeline_time`. For what is not modeled see `docs/planning.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from megatron.layout import LlamaShape
from megatron.model.flops import megatron_flops_per_token, neox_flops_per_token
from megatron.planner.cost import compute, traffic
from megatron.planner.cost.compute import Seconds
from megatron.planner.cost.machines import Machine
from megatron.planner.cost.parallel_layout import ParallelLayout, decoders_by_stage
from megatron.planner.cost.pipeline_time import (
    ChunkTime,
    PipelineTime,
    formula_time,
    simulated_time,
)

# Bytes of a saved parameter: bf16 weight, fp32 master and both moments.
CHECKPOINT_BYTES_PER_PARAMETER = 2 + 3 * 4


@dataclass(frozen=True)
class StageTime:
    """One pipeline stage and one micro-batch, seconds."""

    layers: int
    parameters: float  # of one rank
    compute: Seconds
    tensor_parallel: float
    hideable: float  # part of `tensor_parallel` that concurrent products are long enough to hide
    messages: float  # exposed time; with virtual stages it comes from the simulation
    accumulation: float  # adding the micro-batch's gradients to the fp32 ones

    @property
    def total(self) -> float:
        return self.compute.total + self.tensor_parallel + self.messages + self.accumulation


@dataclass(frozen=True)
class Estimate:
    """A predicted step. Times in seconds; `parts` sum to `step_seconds`."""

    shape: LlamaShape
    layout: ParallelLayout
    seq_length: int
    machine: Machine
    stages: tuple[StageTime, ...]
    pipeline: PipelineTime
    optimizer_seconds: float

    @property
    def pipeline_seconds(self) -> float:
        """All micro-batches through all stages, bubble included."""
        return self.pipeline.computing + self.pipeline.bubble + self.pipeline.messages

    @property
    def reduction_seconds(self) -> float:
        """Exposed reduction of data-parallel gradients."""
        return self.pipeline.reduction

    @property
    def gather_seconds(self) -> float:
        """Exposed gather of data-parallel weights."""
        return self.pipeline.gather

    @property
    def hidden_seconds(self) -> float:
        """The part of reduction and gather assumed to be hidden by computation."""
        return self.pipeline.hidden

    @property
    def exposed_step_seconds(self) -> float:
        """`step_seconds` if no part of reduction and gather were hidden by computation."""
        return self.step_seconds + self.hidden_seconds * self.waiting

    @property
    def slowest(self) -> StageTime:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def hideable_seconds(self) -> float:
        """Seconds that a step would save if every collective launched during a product were hidden by it without
        slowing it down. Not subtracted: a collective takes an unknown number of compute units from the product."""
        return self.slowest.hideable * self.layout.num_micro_batches * self.waiting

    @property
    def waiting(self) -> float:
        """Factor by which a step is longer because all ranks wait for the slowest GCD: the expected maximum of
        world_size normal draws, about sigma sqrt(2 ln n)."""
        return 1.0 + self.machine.spread * math.sqrt(2.0 * math.log(self.layout.world_size))

    @cached_property
    def step_seconds(self) -> float:
        return sum(self.parts.values())

    @cached_property
    def parts(self) -> dict[str, float]:
        """Where the step's time goes, seen from the slowest stage."""
        slowest, steps = self.slowest, self.layout.num_micro_batches
        whole = self.pipeline_seconds + self.reduction_seconds + self.optimizer_seconds + self.gather_seconds
        return {
            "gemm": slowest.compute.gemm * steps,
            "attention": slowest.compute.attention * steps,
            "memory_bound": (slowest.compute.memory_bound + slowest.accumulation) * steps,
            "tensor_parallel": slowest.tensor_parallel * steps,
            "pipeline_messages": self.pipeline.messages,
            "bubble": self.pipeline.bubble,
            "gradient_reduction": self.reduction_seconds,
            "optimizer": self.optimizer_seconds,
            "parameter_gather": self.gather_seconds,
            "waiting": whole * (self.waiting - 1.0),
        }

    @property
    def bubble(self) -> float:
        """Idle over ideal time of the schedule: (p - 1) / m (Narayanan et al. 2021), with virtual stages as simulated,
        messages and unequal stages included."""
        if self.layout.virtual_stages == 1:
            return (self.layout.pipe - 1) / self.layout.num_micro_batches
        return self.pipeline_seconds / self.pipeline.computing - 1.0

    @property
    def recomputed_share(self) -> float:
        """Fraction of the model's decoder layers that are recomputed."""
        return sum(self.layout.recomputed(stage.layers) for stage in self.stages) / self.shape.num_layers

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_batch * self.seq_length

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def tokens_per_second_per_gcd(self) -> float:
        return self.tokens_per_second / self.layout.world_size

    @property
    def tflops_per_gcd(self) -> dict[str, float]:
        """By formula: GPT-NeoX's log counts recomputation (HFU), Megatron-LM's does not (MFU)."""
        rate = self.tokens_per_second_per_gcd / 1e12
        return {
            "neox": rate * neox_flops_per_token(self.shape, self.seq_length, self.recomputed_share),
            "megatron": rate * megatron_flops_per_token(self.shape, self.seq_length),
        }

    @property
    def checkpoint_bytes(self) -> int:
        elements = self.shape.num_parameters
        if self.shape.frozen_base:
            elements = compute.TrainedElements.of(self.shape, 1).layer * self.shape.num_layers
        return CHECKPOINT_BYTES_PER_PARAMETER * elements

    @property
    def checkpoint_seconds(self) -> float:
        return self.checkpoint_bytes / self.machine.file_system_rate

    @property
    def nodes(self) -> int:
        return math.ceil(self.layout.world_size / self.machine.gpus_per_node)


def estimate(
    shape: LlamaShape,
    layout: ParallelLayout,
    seq_length: int,
    machine: Machine,
    *,
    layers: Sequence[int] | None = None,
) -> Estimate:
    """The step of `layout`; `layers` are the decoder layers of each virtual stage in the model's order, by default
    distributed evenly.

    Legality and memory are not checked here but by `megatron.planner.search` and `megatron.planner.cost.memory`.
    """
    virtual = layout.virtual_stages
    dealt = layers or decoders_by_stage(shape.num_layers, layout.pipe * virtual)
    stages, chunks = _stages(shape, layout, seq_length, machine, dealt)
    if virtual > 1:
        pipeline = simulated_time(shape, layout, seq_length, machine, chunks)
    else:
        pipeline = formula_time(layout, machine, chunks, [stage.messages for stage in stages])
    parameters = max(stage.parameters for stage in stages)
    return Estimate(
        shape=shape,
        layout=layout,
        seq_length=seq_length,
        machine=machine,
        stages=tuple(stages),
        pipeline=pipeline,
        optimizer_seconds=_optimizer_seconds(parameters, layout, machine),
    )


def _stages(
    shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine, dealt: Sequence[int]
) -> tuple[list[StageTime], list[ChunkTime]]:
    """The stages, and their chunks in the model's order; `dealt` are the decoder layers of each chunk."""
    half, rate = traffic.half_bytes(shape, layout, seq_length), math.inf
    if layout.tensor > 1:
        rate = traffic.tensor_rate(layout, machine)
    hideable = _hideable_seconds(shape, layout, seq_length, machine, rate)
    message = traffic.message_bytes(shape, layout, seq_length)
    trained = compute.TrainedElements.of(shape, layout.tensor)
    # One decoder layer that is recomputed, and one that is not although full recomputation is on.
    stored = replace(layout, recompute="none") if layout.recompute == "full" else layout
    again, once = (_layer(shape, kind, seq_length, machine) for kind in (layout, stored))

    @cache  # most chunks are alike
    def chunk(layers: int, twice: int, first: bool, last: bool) -> tuple[ChunkTime, Seconds, float]:
        """Time of a chunk that recomputes `twice` of its layers, and of that its computation and its tensor-parallel
        communication."""
        passes = again.times(twice) + once.times(layers - twice)
        if first or last:
            passes += _ends(shape, layout, seq_length, machine, first, last)
        parameters = float(trained.layer * layers)
        if first:
            parameters += trained.vocabulary
        if last:
            parameters += trained.vocabulary * (not (shape.tied and layout.pipe == 1)) + trained.final_norm
        forward, backward = (halves * half / rate for halves in (passes.forward_halves, passes.backward_halves))
        accumulation = _accumulation_seconds(parameters, layout, machine)
        time = ChunkTime(parameters, passes.forward.total + forward, passes.backward.total + backward + accumulation)
        return time, passes.forward + passes.backward, forward + backward

    # Each stage is the sum of its chunks; its first layers are the recomputed ones.
    stages, chunks = [], [ChunkTime(0.0, 0.0, 0.0)] * len(dealt)
    for stage in range(layout.pipe):
        own = range(stage, len(dealt), layout.pipe)
        layers = sum(dealt[number] for number in own)
        twice_left = layout.recomputed(layers)
        computing, tensor = Seconds(), 0.0
        for number in own:
            twice = min(dealt[number], twice_left)
            twice_left -= twice
            chunks[number], work, sent = chunk(dealt[number], twice, number == 0, number == len(dealt) - 1)
            computing += work
            tensor += sent
        messages = 0.0
        if layout.virtual_stages == 1:
            boundaries = [stage - 1] * (stage > 0) + [stage] * (stage < layout.pipe - 1)
            # an activation one way and a gradient the other
            messages = sum(2 * message / traffic.boundary_rate(b, layout, machine) for b in boundaries)
            messages += traffic.message_gathers(layout, stage == 0, stage == layout.pipe - 1) * half / rate
        parameters = sum(chunks[number].parameters for number in own)
        stages.append(
            StageTime(
                layers=layers,
                parameters=parameters,
                compute=computing,
                tensor_parallel=tensor,
                hideable=hideable * layers,
                messages=messages,
                accumulation=_accumulation_seconds(parameters, layout, machine),
            )
        )
    return stages, chunks


@dataclass(frozen=True)
class _Passes:
    """Both passes of a micro-batch through layers: computation, and half-collectives of tensor-parallel ranks."""

    forward: Seconds
    backward: Seconds
    forward_halves: int
    backward_halves: int

    def times(self, layers: int) -> _Passes:
        return _Passes(
            self.forward * layers, self.backward * layers, self.forward_halves * layers, self.backward_halves * layers
        )

    def __add__(self, other: _Passes) -> _Passes:
        return _Passes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.forward_halves + other.forward_halves,
            self.backward_halves + other.backward_halves,
        )


def _layer(shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine) -> _Passes:
    """One decoder layer."""
    forward, backward, recompute = compute.layer_seconds(shape, layout, seq_length, machine)
    halves = traffic.layer_collectives(layout)
    again = halves.forward * (layout.recompute == "full")
    return _Passes(forward, backward + recompute, halves.forward, halves.backward + again)


def _ends(
    shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine, first: bool, last: bool
) -> _Passes:
    """What the first and the last virtual stage have in addition to decoder layers: the embedding, and the head."""
    found = _Passes(Seconds(), Seconds(), 0, 0)
    if first:
        one = compute.embedding_seconds(shape, layout, seq_length, machine) * 0.5
        halves = traffic.end_collectives(layout, True, False)
        found += _Passes(one, one, halves // 2, halves - halves // 2)
    if last:  # one product in the forward pass, two in the backward pass
        one = compute.head_seconds(shape, layout, seq_length, machine)
        halves = traffic.end_collectives(layout, False, True)
        before = int(layout.sequence_parallel and layout.tensor > 1)  # its input is gathered
        found += _Passes(one * (1 / 3), one * (2 / 3), before, halves - before)
    return found


def _hideable_seconds(
    shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine, rate: float
) -> float:
    """The part of a layer's tensor-parallel time in one micro-batch that concurrent products are long enough to hide.

    These products are the weight gradients of both column-parallel matrices and, with sequence parallelism, also their
    input gradients.
    """
    tokens = layout.micro_batch * seq_length
    products = []
    for features_in, features_out in compute.layer_matrices(shape, layout.tensor)[::2]:
        products.append(compute.gemm_seconds(features_in, tokens, features_out, machine))
        if layout.sequence_parallel:
            products.append(compute.gemm_seconds(tokens, features_out, features_in, machine))
    beside = traffic.layer_collectives(layout).beside / len(products)
    return sum(min(beside * traffic.half_bytes(shape, layout, seq_length) / rate, product) for product in products)


def _accumulation_seconds(parameters: float, layout: ParallelLayout, machine: Machine) -> float:
    """The time to accumulate a micro-batch's gradients.

    In bytes per parameter, `BF16_Optimizer` zeroes the bf16 gradients (2), converts them (2 read, 4 written) and adds
    them to the fp32 gradients (8 read, 4 written); megatron-core adds them as they arrive (6 read, 4 written).
    """
    moved = 10 if layout.engine == "megatron" else 2 + 6 + 12
    return parameters * moved / machine.hbm_rate / machine.sustained


def _optimizer_seconds(parameters: float, layout: ParallelLayout, machine: Machine) -> float:
    """The time of the optimizer step. Bytes per parameter: norm (4) and clipping (8) of all fp32 gradients or, after a
    reduce-scatter, of this rank's share; zeroing all of them (4); AdamW on the share: gradient, master and moments read
    (16), all but the gradient written (12), and the bf16 copy (2)."""
    of_all, of_share = (4, 4 + 8) if layout.engine == "megatron" else (4 + 8 + 4, 0)
    moved = parameters * of_all + parameters / layout.data * (of_share + 16 + 12 + 2)
    return moved / machine.hbm_rate / machine.sustained
