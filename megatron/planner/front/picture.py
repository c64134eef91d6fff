"""A plan as a figure: the pipeline's schedule of one step with its bubble, and the memory of every stage.

Needs matplotlib (`pip install .[picture]`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron.common.quantity import quantity
from megatron.planner.cost.machines import GIB
from megatron.planner.cost.memory import KINDS
from megatron.planner.plan import Plan

if TYPE_CHECKING:
    from megatron.planner.cost.schedule import Work

# Okabe and Ito's palette, which is distinguishable with every kind of color vision.
_FORWARD, _AGAIN, _BACKWARD, _IDLE, _END = "#0072b2", "#56b4e9", "#e69f00", "#eeeeee", "#009e73"
_COLORS = dict(
    zip(
        KINDS,
        ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#d55e00", "#cc79a7", "#f0e442", "#999999", "#444444"),
        strict=True,
    )
)


def draw_plan(plan: Plan, path: Path) -> None:
    """Write the picture; imports DeepSpeed for its schedule."""
    import matplotlib
    from matplotlib.figure import Figure

    stages = len(plan.stages)
    # text in an SVG stays text, and equal plans give equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan", "font.size": 9}):
        figure = Figure(figsize=(13, 4.6 + 0.32 * stages), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(1.6 + 0.32 * stages, 3.0))
        _schedule(plan, upper)
        _memory(plan, lower)
        figure.suptitle(_title(plan), x=0.01, ha="left", fontsize=12, fontweight="bold")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def _title(plan: Plan) -> str:
    layout = plan.layout
    return (
        f"{plan.parameters_total / 1e9:.1f} billion parameters on {quantity(layout.world_size, 'rank')}: TP "
        f"{layout.tensor} x PP {layout.pipe} x DP {layout.data}, micro-batch "
        f"{layout.micro_batch} x {layout.num_micro_batches}"
    )


def _schedule(plan: Plan, axes) -> None:  # type: ignore[no-untyped-def]  # matplotlib has no types here
    from matplotlib.patches import Patch

    from megatron.planner.cost.schedule import idle_share

    stages = len(plan.stages)
    # a backward pass takes twice as long as a forward pass, plus the recomputed part of one
    again = [plan.layout.recomputed(stage.layers) / max(1, stage.layers) for stage in plan.time.stages]
    slower = plan.time.waiting
    forward = [slower * stage.total / (3 + more) for stage, more in zip(plan.time.stages, again, strict=True)]
    work = _work(plan, forward, again)
    end = max(item.stop for item in work)
    after = slower * (plan.time.reduction_seconds + plan.time.optimizer_seconds + plan.time.gather_seconds)
    # A gray bar for each stage, on it one bar per pass; what stays gray is idle time.
    axes.barh(range(stages), end, left=0, color=_IDLE, height=0.86)
    for one in work:
        start, length = one.start, one.stop - one.start
        first = length * again[one.stage] / (2 + again[one.stage]) if one.kind == "backward" else 0.0
        if first:
            axes.barh(one.stage, first, left=start, color=_AGAIN, height=0.86)
        color = _FORWARD if one.kind == "forward" else _BACKWARD
        axes.barh(one.stage, length - first, left=start + first, color=color, height=0.86)
        axes.plot([start, start], [one.stage - 0.43, one.stage + 0.43], color="white", linewidth=0.5)
        if length / (end + after) > 0.011:
            axes.text(
                start + (first + length) / 2,
                one.stage,
                str(one.micro_batch + 1),
                ha="center",
                va="center",
                color="white",
                fontsize=7,
            )
    # After the schedule: gradient reduction, optimizer and weight gather.
    axes.barh(range(stages), after, left=end, color=_END, height=0.86)
    axes.set_xlim(0, end + after)
    axes.set_ylim(stages - 0.5, -0.5)
    axes.set_yticks(range(stages))
    axes.set_ylabel("stage")
    axes.set_xlabel(f"seconds of a step, predicted for {plan.machine.name}; numbers are micro-batches")
    handles = [
        Patch(color=_FORWARD, label="forward"),
        *([Patch(color=_AGAIN, label="forward again (recomputation)")] if any(again) else []),
        Patch(color=_BACKWARD, label="backward"),
        Patch(color=_IDLE, label=f"idle: {idle_share(work, stages):.0%} of the schedule"),
        Patch(color=_END, label="gradient reduction, optimizer"),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _work(plan: Plan, forward: list[float], again: list[float]) -> list[Work]:
    """All passes of a step; `forward` are the stages' seconds, `again` the part of them that is recomputed."""
    from megatron.planner.cost import interleaved, schedule

    layout, m = plan.layout, plan.layout.num_micro_batches
    backward = [one * (2 + more) for one, more in zip(forward, again, strict=True)]
    if layout.engine == "deepspeed":
        return schedule.timeline(m, forward, backward)
    virtual = layout.virtual_stages
    of_chunks = [[one / virtual for one in seconds] * virtual for seconds in (forward, backward)]
    return interleaved.timeline(layout.pipe, virtual, m, of_chunks[0], of_chunks[1])


def _memory(plan: Plan, axes) -> None:  # type: ignore[no-untyped-def]
    stages = range(len(plan.stages))
    bottom = [0.0 for _ in stages]
    for kind in KINDS:
        heights = [stage.by_kind[kind] / GIB for stage in plan.stages]
        if max(heights) < 0.002 * plan.fullest.peak / GIB:
            continue
        axes.bar(stages, heights, bottom=bottom, color=_COLORS[kind], label=kind, width=0.7)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for stage in plan.stages:
        axes.text(stage.stage, bottom[stage.stage], f"{stage.peak / GIB:.1f}", ha="center", va="bottom", fontsize=8)
    limit = plan.usable_bytes / GIB
    if max(bottom) > 0.15 * limit:
        axes.axhline(limit, color="black", linewidth=1, linestyle="--")
        axes.text(len(plan.stages) - 0.5, limit, f" {limit:.0f} GiB usable", ha="right", va="bottom", fontsize=8)
        axes.set_ylim(0, 1.12 * max(limit, *bottom))
    axes.set_xlim(-0.6, len(plan.stages) - 0.4)
    axes.set_xticks(stages)
    axes.set_xlabel("stage")
    axes.set_ylabel("GiB a rank at its fullest")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
