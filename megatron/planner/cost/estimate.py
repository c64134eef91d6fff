"""What a layout costs in time: one step of training, predicted without hardware.

    estimate(shape, layout, seq_length, machine) -> Estimate
    reliability(estimate) -> Reliability           saves and failures
    budget(estimate, tokens) -> Budget             days and node-hours

Pure arithmetic on the model's sizes (`compute`), on who sends what to whom (`traffic`) and on one machine's constants
(`machines`); no torch. What it takes for granted: bf16, the 1F1B schedule, communication overlapped with nothing: so it
is in DeepSpeed's pipeline engine, but for collectives of tensor parallelism beside a product (`hideable_seconds`). What
it does not know: `docs/planning.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron.layout import LlamaShape
from megatron.model.flops import megatron_flops_per_token, neox_flops_per_token
from megatron.planner.cost import compute, traffic
from megatron.planner.cost.compute import Seconds
from megatron.planner.cost.machines import Machine
from megatron.planner.cost.parallel_layout import ParallelLayout, decoders_by_stage

# Bytes of a saved parameter: bf16 weight, fp32 master and both moments.
CHECKPOINT_BYTES_PER_PARAMETER = 2 + 3 * 4


@dataclass(frozen=True)
class StageTime:
    """One pipeline stage and one micro-batch, seconds."""

    layers: int
    parameters: float  # of one rank
    compute: Seconds
    tensor_parallel: float
    hideable: float  # part of `tensor_parallel` that products beside it are long enough to hide
    messages: float
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
    pipeline_seconds: float  # all micro-batches through all stages, bubble included
    reduction_seconds: float  # data-parallel gradients
    optimizer_seconds: float
    gather_seconds: float  # data-parallel weights

    @property
    def slowest(self) -> StageTime:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def hideable_seconds(self) -> float:
        """What a step would gain if every collective that is launched beside a product ran behind it and did not slow
        it down. Not taken off: a collective takes compute units from the product, and how many is not known."""
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
        busy = slowest.total * steps
        whole = self.pipeline_seconds + self.reduction_seconds + self.optimizer_seconds + self.gather_seconds
        return {
            "gemm": slowest.compute.gemm * steps,
            "attention": slowest.compute.attention * steps,
            "memory_bound": (slowest.compute.memory_bound + slowest.accumulation) * steps,
            "tensor_parallel": slowest.tensor_parallel * steps,
            "pipeline_messages": slowest.messages * steps,
            "bubble": self.pipeline_seconds - busy,
            "gradient_reduction": self.reduction_seconds,
            "optimizer": self.optimizer_seconds,
            "parameter_gather": self.gather_seconds,
            "waiting": whole * (self.waiting - 1.0),
        }

    @property
    def bubble(self) -> float:
        """Idle over ideal time of the schedule, (p - 1) / (v m) (Narayanan et al. 2021)."""
        return (self.layout.pipe - 1) / (self.layout.virtual_stages * self.layout.num_micro_batches)

    @property
    def recomputed_share(self) -> float:
        """Of the model's decoder layers, those that are computed again."""
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
        return CHECKPOINT_BYTES_PER_PARAMETER * self.shape.num_parameters

    @property
    def checkpoint_seconds(self) -> float:
        return self.checkpoint_bytes / self.machine.file_system_rate

    @property
    def nodes(self) -> int:
        return math.ceil(self.layout.world_size / self.machine.gpus_per_node)


@dataclass(frozen=True)
class Reliability:
    """What saving and failing cost, seconds; the share is of all time."""

    mean_time_to_interrupt: float  # of the whole job: an assumption, see `Machine.node_mtbf_seconds`
    save_seconds: float
    save_interval: float  # the one that loses least (Young 1974, Daly 2006, first order): sqrt(2 save interrupt)
    lost_to_saves: float  # shares
    lost_to_failures: float  # half an interval is computed again, and the restart

    @property
    def useful(self) -> float:
        return 1.0 / (1.0 + self.lost_to_saves + self.lost_to_failures)


@dataclass(frozen=True)
class Budget:
    """A number of tokens, in time on the machine."""

    tokens: float
    steps: int
    days: float  # saves and failures included
    node_hours: float


def reliability(estimate: Estimate, blocked_seconds: float | None = None) -> Reliability:
    """`blocked_seconds` is how long a save stops training: all of the write unless it is asynchronous.

    Saves do not come faster than they are written, one being in flight at a time.
    """
    machine = estimate.machine
    interrupt = machine.node_mtbf_seconds / estimate.nodes
    save = estimate.checkpoint_seconds if blocked_seconds is None else blocked_seconds
    interval = max(math.sqrt(2.0 * save * interrupt), estimate.checkpoint_seconds)
    return Reliability(
        mean_time_to_interrupt=interrupt,
        save_seconds=save,
        save_interval=interval,
        lost_to_saves=save / interval,
        lost_to_failures=(interval / 2.0 + machine.restart_seconds) / interrupt,
    )


def budget(estimate: Estimate, tokens: float, blocked_seconds: float | None = None) -> Budget:
    """Time for `tokens` tokens, with what saves and failures take; `blocked_seconds` as for `reliability`."""
    steps = math.ceil(tokens / estimate.tokens_per_step)
    seconds = steps * estimate.step_seconds / reliability(estimate, blocked_seconds).useful
    return Budget(tokens, steps, seconds / 86_400, seconds / 3600 * estimate.nodes)


def estimate(
    shape: LlamaShape,
    layout: ParallelLayout,
    seq_length: int,
    machine: Machine,
    *,
    layers: Sequence[int] | None = None,
) -> Estimate:
    """The step of `layout`; `layers` are the decoder layers of each stage, default DeepSpeed's even split.

    Legality and memory are not looked at: `megatron.planner.search` and `megatron.planner.cost.memory` do.
    """
    stages = tuple(
        _stages(shape, layout, seq_length, machine, layers or decoders_by_stage(shape.num_layers, layout.pipe))
    )
    times = [stage.total for stage in stages]
    longest = max(times)
    # the first micro-batch passes every stage, forwards and backwards; each further one waits for the longest stage
    fill = (sum(times) - longest) / layout.virtual_stages
    parameters = max(stage.parameters for stage in stages)
    return Estimate(
        shape=shape,
        layout=layout,
        seq_length=seq_length,
        machine=machine,
        stages=stages,
        pipeline_seconds=fill + layout.num_micro_batches * longest,
        reduction_seconds=traffic.reduction_seconds(parameters, layout, machine),
        optimizer_seconds=_optimizer_seconds(parameters, layout, machine),
        gather_seconds=traffic.gather_seconds(parameters, layout, machine),
    )


def _stages(
    shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine, layers_of_stage: Sequence[int]
) -> list[StageTime]:
    stored = replace(layout, recompute="none") if layout.recompute == "full" else layout
    again, once = (_layer(shape, kind, seq_length, machine) for kind in (layout, stored))
    rate = traffic.tensor_rate(layout, machine) if layout.tensor > 1 else math.inf
    hideable = _hideable_seconds(shape, layout, seq_length, machine, rate)
    half = traffic.half_bytes(shape, layout, seq_length)
    message = traffic.message_bytes(shape, layout, seq_length)
    matrix = shape.padded_vocab_size * shape.hidden_size / layout.tensor
    layer_parameters = sum(i * o for i, o in compute.layer_matrices(shape, layout.tensor)) + 2 * shape.hidden_size
    stages = []
    for stage, layers in enumerate(layers_of_stage):
        first, last = stage == 0, stage == layout.pipe - 1
        twice = layout.recomputed(layers)
        work = again[0] * twice + once[0] * (layers - twice)
        reduced = again[1] * twice + once[1] * (layers - twice)
        parameters = float(layer_parameters * layers)
        if first:
            work += compute.embedding_seconds(shape, layout, seq_length, machine)
            parameters += matrix
        if last:
            work += compute.head_seconds(shape, layout, seq_length, machine)
            parameters += matrix * (not (shape.tied and first)) + shape.hidden_size
        boundaries = [stage - 1] * (not first) + [stage] * (not last)
        # activations one way, gradients the other
        messages = sum(2 * message / traffic.boundary_rate(b, layout, machine) for b in boundaries)
        messages += traffic.message_gathers(layout, first, last) * half / rate
        stages.append(
            StageTime(
                layers=layers,
                parameters=parameters,
                compute=work,
                tensor_parallel=(reduced + traffic.end_collectives(layout, first, last) * half) / rate,
                hideable=hideable * layers,
                messages=messages * layout.virtual_stages,
                accumulation=_accumulation_seconds(parameters, machine),
            )
        )
    return stages


def _layer(shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine) -> tuple[Seconds, float]:
    """One decoder layer and micro-batch: computation, and bytes sent between tensor-parallel ranks."""
    return (
        sum(compute.layer_seconds(shape, layout, seq_length, machine), Seconds()),
        traffic.tensor_bytes_per_layer(shape, layout, seq_length),
    )


def _hideable_seconds(
    shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine, rate: float
) -> float:
    """The part of a layer's tensor-parallel time, for one micro-batch, that products beside it are long enough to hide.

    Those products give the gradients of both column-parallel matrices; with sequence parallelism of their inputs too.
    """
    tokens = layout.micro_batch * seq_length
    products = []
    for features_in, features_out in compute.layer_matrices(shape, layout.tensor)[::2]:
        products.append(compute.gemm_seconds(features_in, tokens, features_out, machine))
        if layout.sequence_parallel:
            products.append(compute.gemm_seconds(tokens, features_out, features_in, machine))
    beside = traffic.layer_collectives(layout).beside / len(products)
    return sum(min(beside * traffic.half_bytes(shape, layout, seq_length) / rate, product) for product in products)


def _accumulation_seconds(parameters: float, machine: Machine) -> float:
    """`BF16_Optimizer` zeroes the bf16 gradients, converts them (2 read, 4 written) and adds them to the fp32 ones
    (8 read, 4 written), for every micro-batch."""
    return parameters * (2 + 6 + 12) / machine.hbm_rate / machine.sustained


def _optimizer_seconds(parameters: float, layout: ParallelLayout, machine: Machine) -> float:
    """Norm (4), clipping (8) and zeroing (4) of full fp32 gradients; AdamW on this rank's share: gradient, master and
    moments read, all but the gradient written, and the bf16 copy."""
    moved = parameters * (4 + 8 + 4) + parameters / layout.data * (16 + 12 + 2)
    return moved / machine.hbm_rate / machine.sustained
