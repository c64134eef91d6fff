"""A run's plan: its stages and their memory, the time of a step, the size of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron.layout import LayerFile
from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.planner.cost.activations import Ops
from megatron.planner.cost.checkpoint_size import CheckpointSize, checkpoint_size
from megatron.planner.cost.estimate import Estimate, estimate
from megatron.planner.cost.machines import GIB, MACHINES, Machine
from megatron.planner.cost.memory import StageMemory, fewest_recomputed, plan_memory
from megatron.planner.cost.moments import held_files
from megatron.planner.cost.parallel_layout import ParallelLayout
from megatron.planner.cost.reliability import Budget, Reliability, budget, reliability


@dataclass(frozen=True)
class Plan:
    """The plan of one run. `parameters_total` counts replicated tensors once, as a model card does."""

    args: NeoXArgs
    layout: ParallelLayout
    machine: Machine
    usable_bytes: int
    parameters_total: int
    stages: list[StageMemory]
    checkpoint: CheckpointSize
    time: Estimate
    tokens: float | None = None

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def stage_layers(self) -> list[range]:
        """Layer-file numbers of every virtual stage, in the model's order."""
        return [stage.chunks[chunk] for chunk in range(self.layout.virtual_stages) for stage in self.stages]

    @property
    def fits(self) -> bool:
        return self.fullest.peak <= self.usable_bytes

    @property
    def nodes(self) -> int:
        return self.time.nodes

    @property
    def reliability(self) -> Reliability:
        return reliability(self.time, self.blocked_seconds)

    @property
    def blocked_seconds(self) -> float | None:
        """How long a save stops training: with `async_save`, the time in which the rank with the most to write copies
        it to host memory; None for the whole write."""
        if not self.args.async_save:
            return None
        written = [
            stage.optimizer + stage.weights * -(-len(stage.layers) // self.layout.data) / len(stage.layers)
            for stage in self.stages
        ]
        return max(written) / self.machine.host_link_rate

    @property
    def budget(self) -> Budget | None:
        return None if self.tokens is None else budget(self.time, self.tokens, self.blocked_seconds)

    def as_json(self) -> dict[str, Any]:
        """Bytes, seconds, tokens; layer numbers are the checkpoint's."""
        plan: dict[str, Any] = {
            "world_size": self.layout.world_size,
            "nodes": self.nodes,
            "layout": asdict(self.layout),
            "global_batch": self.layout.global_batch,
            "seq_length": self.args.seq_length,
            "tokens_per_step": self.time.tokens_per_step,
            "precision": self.args.precision,
            "machine": self.machine.name,
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "parameters_total": self.parameters_total,
            "stages": [
                {
                    "stage": stage.stage,
                    "layers": list(stage.layers),
                    "decoder_layers": stage.decoder_layers,
                    "parameters": stage.parameters,
                    "bytes": stage.by_kind,
                    "peak": stage.peak,
                    "allocated": stage.allocated,
                    "moment": stage.moment,
                }
                for stage in self.stages
            ],
            "checkpoint_bytes": self.checkpoint.total,
            "checkpoint": asdict(self.checkpoint),
            "tokens_per_second_per_gcd": self.time.tokens_per_second_per_gcd,
            "tokens_per_second": self.time.tokens_per_second,
            "tflops_per_gcd": self.time.tflops_per_gcd,
            "step_seconds": self.time.step_seconds,
            "step_parts": self.time.parts,
            "bubble": self.time.bubble,
            "reliability": asdict(self.reliability),
        }
        if self.budget is not None:
            plan["budget"] = asdict(self.budget)
        return plan


def make_plan(
    args: NeoXArgs,
    stage_layers: Sequence[range],
    parameters_total: int,
    machine: Machine,
    usable_bytes: int | None = None,
    tokens: float | None = None,
) -> Plan:
    """The plan of a resolved training configuration; `stage_layers` and `parameters_total` are the real model's."""
    layout = ParallelLayout.of(args)
    stages = memory_of(args, layout, machine, stage_layers)
    return Plan(
        args=args,
        layout=layout,
        machine=machine,
        usable_bytes=machine.usable_hbm_bytes if usable_bytes is None else usable_bytes,
        parameters_total=parameters_total,
        stages=stages,
        checkpoint=checkpoint_size(args.trained_shape, layout.tensor, args.precision),
        time=estimate(args.whole_shape, layout, args.seq_length, machine, layers=decoders_of(args, stage_layers)),
        tokens=tokens,
    )


def decoders_of(args: NeoXArgs, chunks: Sequence[range]) -> list[int]:
    """How many decoder layers each run of layer-file numbers has."""
    return [held_files(LayerFile.DECODER, args.shape, [chunk]) for chunk in chunks]


def memory_of(
    args: NeoXArgs, layout: ParallelLayout, machine: Machine, stage_layers: Sequence[range] | None = None
) -> list[StageMemory]:
    """Memory of the configured model under `layout`, which need not be the configured layout."""
    ops: Ops = "cpu" if args.device == "cpu" else "torch" if args.kernels == "reference" else "kernels"
    return plan_memory(
        args.whole_shape,
        layout,
        args.seq_length,
        args.precision,
        stage_layers=stage_layers,
        isolate_documents=args.isolate_documents,
        ops=ops,
        machine=machine,
        reduce_bucket_size=args.zero_optimization.reduce_bucket_size,
        contiguous_gradients=args.zero_optimization.contiguous_gradients,
    )


def find_machine(name: str) -> Machine:
    """The machine called `name`; raises ConfigError if `megatron.planner.cost.machines` does not describe it."""
    if name not in MACHINES:
        raise ConfigError(f"--machine: {name!r} is not known; known: {', '.join(MACHINES)}")
    return MACHINES[name]


def refusal(plan: Plan) -> str:
    """Why a plan does not fit, and what would fit."""
    stage, limit = plan.fullest, plan.usable_bytes / GIB
    over = sum(stage.peak > plan.usable_bytes for stage in plan.stages)
    where = f"stage {stage.stage} needs {stage.peak / GIB:.1f} GiB a GCD"
    others = f", and {over} of {len(plan.stages)} stages are too large" if over > 1 else ""
    parts = sorted(stage.by_kind.items(), key=lambda kind: -kind[1])[:3]
    most = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in parts)
    fitting = [f"{what} ({peak / GIB:.1f} GiB)" for what, peak in remedies(plan) if peak <= plan.usable_bytes]
    advice = (
        "what would fit: " + "; or ".join(fitting[:3])
        if fitting
        else "neither recomputation nor twice the stages or tensor-parallel ranks is enough: --search tries all layouts"
    )
    return (
        f"this run does not fit: {where}, of which {limit:.1f} GiB can be used on {plan.machine.name}{others}. Most of "
        f"it: {most} GiB. {advice[0].upper()}{advice[1:]}. Pass --allow-memory to continue anyway"
    )


def _fits(plan: Plan, layout: ParallelLayout) -> bool:
    """Whether `layout`, with the plan's stages, fits."""
    stages = memory_of(plan.args, layout, plan.machine, plan.stage_layers)
    return max(stage.peak for stage in stages) <= plan.usable_bytes


def _fewest(plan: Plan, layout: ParallelLayout) -> int | None:
    """The least `recompute_layers` with which a layout fits; None if all layers are needed, or are not enough."""
    longest = max(stage.decoder_layers for stage in plan.stages)
    return fewest_recomputed(layout, longest, lambda other: _fits(plan, other))


def faster(plan: Plan) -> list[str]:
    """Faster alternatives that fit: recomputing no more than memory requires, also with sequence parallelism.

    One line each, with its gain; none for a plan that does not fit or recomputes nothing.
    """
    if not plan.fits or plan.layout.recompute != "full":
        return []
    lines = []
    for prefix, layout in (("", plan.layout), ("sequence_parallel: true with ", _sliced(plan))):
        least = None if layout is None else _least_recomputed(plan, layout)
        if least is not None and (gain := _gain(plan, least[1])) > 0:
            lines.append(f"{prefix}{least[0]} would fit too: {gain:+.0%} tokens/s, predicted")
    return lines


def _least_recomputed(plan: Plan, layout: ParallelLayout) -> tuple[str, ParallelLayout] | None:
    """The key and the layout of the least recomputation that fits; None if all layers are needed, or not enough."""
    stored = replace(layout, recompute="none", recompute_layers=None)
    if _fits(plan, stored):
        return "checkpoint_activations: false", stored
    fewest = _fewest(plan, layout)
    return None if fewest is None else (f"recompute_layers: {fewest}", replace(layout, recompute_layers=fewest))


def _gain(plan: Plan, layout: ParallelLayout) -> float:
    """Relative gain in tokens per second of `layout`, with the plan's stages, over the plan."""
    time, layers = plan.time, decoders_of(plan.args, plan.stage_layers)
    other = estimate(time.shape, layout, time.seq_length, plan.machine, layers=layers)
    return other.tokens_per_second / time.tokens_per_second - 1


def _sliced(plan: Plan) -> ParallelLayout | None:
    """The layout with sequence parallelism; None if it already has it or cannot have it."""
    layout = plan.layout
    if layout.sequence_parallel or layout.tensor == 1 or plan.args.seq_length % layout.tensor:
        return None
    return replace(layout, sequence_parallel=True)


def remedies(plan: Plan) -> list[tuple[str, int]]:
    """Changes that save memory and keep ranks and global batch, each with the fullest stage's bytes."""
    args, layout = plan.args, plan.layout
    candidates: list[tuple[str, ParallelLayout]] = []
    # Changes that keep the layout's sizes: sequence parallelism, recomputation, a smaller micro-batch.
    sliced = _sliced(plan)
    if sliced is not None:
        candidates.append(("sequence_parallel: true", sliced))
    recomputed = replace(layout, recompute="full", recompute_layers=None)
    fewest = _fewest(plan, layout)
    if fewest is not None:
        partly = replace(recomputed, recompute_layers=fewest)
        candidates.append((f"checkpoint_activations: true with recompute_layers: {fewest}", partly))
    if layout != recomputed:
        every = "recompute_layers left out" if layout.recompute == "full" else "checkpoint_activations: true"
        candidates.append((every, recomputed))
    if layout.micro_batch > 1:
        smaller = replace(layout, micro_batch=1, num_micro_batches=layout.num_micro_batches * layout.micro_batch)
        candidates.append(("train_micro_batch_size_per_gpu: 1", smaller))
    # Twice the stages or tensor-parallel ranks, and half the data-parallel ranks.
    for key, larger in (
        ("pipe_parallel_size", replace(layout, pipe=2 * layout.pipe)),
        ("model_parallel_size", replace(layout, tensor=2 * layout.tensor)),
    ):
        if layout.data % 2 or larger.pipe > args.num_layers or larger.tensor > plan.machine.gpus_per_node:
            continue
        if larger.sequence_parallel and args.seq_length % larger.tensor:
            continue
        larger = replace(larger, data=layout.data // 2, num_micro_batches=2 * layout.num_micro_batches)
        size = larger.pipe if key == "pipe_parallel_size" else larger.tensor
        candidates.append((f"{key}: {size}", larger))
        if layout.recompute != "full":
            candidates.append((f"checkpoint_activations: true with {key}: {size}", replace(larger, recompute="full")))
    found = []
    for what, candidate in candidates:
        try:
            stages = memory_of(args, candidate, plan.machine)
        except ValueError:  # the model's heads cannot be split over so many ranks
            continue
        found.append((what, max(stage.peak for stage in stages)))
    return found
