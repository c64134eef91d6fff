"""A plan as human-readable text."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table

from megatron.common.quantity import quantity
from megatron.planner.cost.estimate import Estimate
from megatron.planner.cost.machines import GIB
from megatron.planner.cost.memory import StageMemory
from megatron.planner.plan import Plan, faster

WIDTH = 138  # columns; a log file has no terminal width


def text(plan: Plan, width: int = WIDTH) -> str:
    """The whole plan, some 40 lines."""
    parts = [_what(plan), _memory(plan, width), _verdict(plan), _time(plan), _checkpoint(plan)]
    if plan.budget is not None:
        parts.append(
            f"{plan.budget.tokens:.4g} tokens: {plan.budget.steps:,} steps, {plan.budget.days:.1f} days, "
            f"{plan.budget.node_hours:,.0f} node-hours, saves and failures included"
        )
    return "\n\n".join(parts) + "\n"


def _what(plan: Plan) -> str:
    layout, args = plan.layout, plan.args
    recompute = {
        "full": "every decoder layer recomputed",
        "selective": "all but matrix products recomputed",
        "none": "nothing recomputed",
    }[layout.recompute]
    if layout.recompute_layers is not None:
        recompute = f"{layout.recompute_layers} decoder layers of each stage recomputed"
    sliced = ", sequence parallel" if layout.sequence_parallel else ""
    virtual = f" ({layout.virtual_stages} virtual stages each)" if layout.virtual_stages > 1 else ""
    engine = "megatron-core's engine, " if layout.engine == "megatron" else ""
    nodes = f" ({plan.nodes:,} nodes of {plan.machine.gpus_per_node})" if plan.nodes > 1 else ""
    trained = "" if plan.args.lora is None else f" ({plan.args.trained_shape.num_parameters:,} are trained)"
    return (
        f"{plan.parameters_total:,} parameters{trained} on {quantity(layout.world_size, 'rank')}{nodes}: TP "
        f"{layout.tensor} x PP {layout.pipe}{virtual} x DP {layout.data}, {args.precision}, {engine}"
        f"{recompute}{sliced}\n"
        f"batch of {layout.global_batch:,} sequences = micro-batch {layout.micro_batch} x accumulation "
        f"{layout.num_micro_batches} x data parallel {layout.data}; {plan.time.tokens_per_step:,} tokens a step"
    )


# Heading, and the kinds of `StageMemory` whose bytes stand below it.
_COLUMNS = (
    ("weights", ("weights",)),
    ("gradients", ("gradients",)),
    ("optimizer", ("optimizer",)),
    ("activa-\ntions", ("activations",)),
    ("work-\nspace", ("workspace",)),
    ("logits", ("logits",)),
    ("buffers", ("pipeline", "tables")),
    ("commu-\nnicators", ("communicators",)),
)


def _memory(plan: Plan, width: int) -> str:
    unit, scale = ("GiB", GIB) if plan.fullest.peak >= GIB else ("MiB", GIB >> 10)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("stage", "layers", "param-\neters", *(heading for heading, _ in _COLUMNS), "peak", "of\nusable"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fullest in", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            _layers(stage),
            f"{stage.parameters / 1e6:,.1f} M",
            *(f"{sum(stage.by_kind[kind] for kind in kinds) / scale:.2f}" for _, kinds in _COLUMNS),
            f"{stage.peak / scale:.2f}",
            f"{stage.peak / plan.usable_bytes:.0%}",
            f" {stage.moment}",
        )
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True, highlight=False).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([f"memory of one rank of each stage, {unit}:", *filter(None, lines)])


def _layers(stage: StageMemory) -> str:
    """Numbers of the first and the last layer; of several runs of layers, of the first and the last run."""
    first, last = (f"{chunk.start}-{chunk.stop - 1}" for chunk in (stage.chunks[0], stage.chunks[-1]))
    return first if len(stage.chunks) == 1 else f"{first}..{last}"


def _verdict(plan: Plan) -> str:
    stage = plan.fullest
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    line = (
        f"{verdict}: at most {stage.peak / GIB:.1f} GiB (stage {stage.stage}, {stage.moment}) of the "
        f"{plan.usable_bytes / GIB:.1f} GiB that can be used on {plan.machine.name}"
    )
    return "\n".join([line, *faster(plan)])


def _time(plan: Plan) -> str:
    time = plan.time
    flops = time.tflops_per_gcd
    peak = plan.machine.peak_flops / 1e12
    shares = ", ".join(
        f"{name.replace('_', ' ')} {seconds / time.step_seconds:.1%}"
        for name, seconds in sorted(time.parts.items(), key=lambda part: -part[1])
        if seconds / time.step_seconds >= 0.001
    )
    differs = [
        *(["on CPUs"] if plan.args.device == "cpu" else []),
        *(["in fp32"] if plan.args.precision == "fp32" else []),
    ]
    share = time.hideable_seconds / time.step_seconds
    hideable = (
        f"\n  overlapping collectives with products could save {share:.1%} of the step; not subtracted" if share else ""
    )
    assumed = f" in bfloat16 (this run is {' and '.join(differs)})" if differs else ""
    return (
        f"time predicted for {plan.machine.name}{assumed}: {time.step_seconds:.3g} s a step, "
        f"{time.tokens_per_second_per_gcd:,.1f} tokens/s a GCD, {time.tokens_per_second:,.0f} in all\n"
        f"  {flops['neox']:.1f} TFLOP/s a GCD by GPT-NeoX's formula (HFU {flops['neox'] / peak:.0%}), "
        f"{flops['megatron']:.1f} by Megatron's (MFU {flops['megatron'] / peak:.0%} of {peak:.1f})\n"
        f"  {shares}\n"
        f"  {_bubble(time)}{hideable}"
    )


def _bubble(time: Estimate) -> str:
    layout = time.layout
    if layout.virtual_stages == 1:
        return f"bubble (p - 1) / m = {time.bubble:.0%} of the busy time"
    hidden = ""
    if time.hidden_seconds > 0:
        hidden = f"\n  computation hides {time.hidden_seconds:.2g} s of gradient reduction and parameter gather"
    return (
        f"bubble, simulated with {layout.virtual_stages} virtual stages, messages and unequal ends included: "
        f"{time.bubble:.0%} of the busy time{hidden}"
    )


def _checkpoint(plan: Plan) -> str:
    size, safe = plan.checkpoint, plan.reliability
    beside = (
        "" if plan.blocked_seconds is None else f" during training, which waits {safe.save_seconds:.2g} s for a copy"
    )
    return (
        f"checkpoint: {_decimal(size.total)} (weights {_decimal(size.weights)}, optimizer {_decimal(size.optimizer)}), "
        f"{plan.time.checkpoint_seconds:.1f} s to write{beside}; saving every {_minutes(safe.save_interval)} loses "
        f"least: {safe.lost_to_saves:.1%} to saves, {safe.lost_to_failures:.1%} to failures"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def _decimal(size: int) -> str:
    """Bytes as file systems count them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,} bytes"
