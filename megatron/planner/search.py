"""Every layout that a number of GCDs and a global batch allow, by predicted tokens per second, and why losers lose.

    result = search(shape, world_size, global_batch, seq_length, machine)
    result.ranked        candidates that the trainer runs today and that fit, fastest first
    result.lost          candidates that do not fit, each with its reason
    result.later         what sequence parallelism, interleaving or selective recomputation would give
    result.lines()       all of it as text

Time is `megatron.planner.estimate`'s, memory `megatron.planner.memory`'s. Legal is what `NeoXArgs` accepts: tensor
parallelism divides heads, key/value heads, MLP width and vocabulary and stays inside a node, every stage has a layer,
and micro-batch x accumulation x data parallel is the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.model.layout import LlamaShape
from megatron.planner.estimate import Estimate, estimate
from megatron.planner.machines import GIB, Machine
from megatron.planner.memory import StageMemory, plan_memory
from megatron.planner.parallel_layout import ParallelLayout, Recompute

RECOMPUTE: tuple[Recompute, ...] = ("none", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout, what it takes, and in `reason` what holds it back."""

    layout: ParallelLayout
    estimate: Estimate
    peak_bytes: int
    fullest_stage: int
    reason: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.estimate.tokens_per_second


@dataclass(frozen=True)
class SearchResult:
    machine: Machine
    seq_length: int
    global_batch: int
    ranked: list[Candidate]
    lost: list[Candidate]  # too large, fastest first
    later: list[Candidate]  # fit and are faster than the best of today, best of each kind

    @property
    def best(self) -> Candidate | None:
        return self.ranked[0] if self.ranked else None

    def find(self, tensor: int, pipe: int, micro_batch: int, recompute: Recompute = "full") -> Candidate | None:
        """The candidate of today's with these sizes, fitting or not."""
        for candidate in self.ranked + self.lost:
            layout = candidate.layout
            if (layout.tensor, layout.pipe, layout.micro_batch, layout.recompute) == (
                tensor,
                pipe,
                micro_batch,
                recompute,
            ):
                return candidate
        return None

    def lines(self, top: int = 10) -> list[str]:
        """A table for people: the `top` fastest, the fastest of those that do not fit, and what is not built yet."""
        lines = _table(self.ranked[:top], self.best)
        if not self.ranked:
            lines = [f"no layout fits {self.machine.usable_hbm_bytes / GIB:.0f} GiB a GCD"]
        if self.lost:
            lines += ["", f"{len(self.lost)} do not fit; the fastest of them:", *_table(self.lost[:5], self.best)]
        if self.later:
            lines += ["", "not built yet, and their gain over the best of today:", *_table(self.later, self.best)]
        return lines


def search(
    shape: LlamaShape,
    world_size: int,
    global_batch: int,
    seq_length: int,
    machine: Machine,
    precision: str = "bfloat16",
    usable_bytes: int | None = None,
) -> SearchResult:
    """All legal layouts of `world_size` GCDs and `global_batch` sequences a step.

    `usable_bytes` is the memory of a GCD that a layout may take, the machine's unless given. Raises ValueError if there
    is no legal layout at all.
    """
    limit = machine.usable_hbm_bytes if usable_bytes is None else usable_bytes
    today = [
        _candidate(shape, layout, seq_length, machine, precision)
        for layout in layouts(shape, world_size, global_batch, machine)
    ]
    if not today:
        raise ValueError(
            f"no layout of {world_size} GCDs fits a global batch of {global_batch} sequences: data-parallel ranks must "
            f"divide it, with tensor-parallel sizes that divide the model's heads and a node's {machine.gpus_per_node}"
        )
    today.sort(key=lambda candidate: -candidate.tokens_per_second)
    fitting = [candidate for candidate in today if candidate.peak_bytes <= limit]
    best = fitting[0] if fitting else None
    ranked = [replace(candidate, reason=_behind(candidate, best)) for candidate in fitting]
    lost = [replace(c, reason=_too_large(c, limit)) for c in today if c.peak_bytes > limit]
    later = _later(shape, [c.layout for c in today], seq_length, machine, precision, limit, best)
    return SearchResult(machine, seq_length, global_batch, ranked, lost, later)


def layouts(shape: LlamaShape, world_size: int, global_batch: int, machine: Machine) -> Iterator[ParallelLayout]:
    """Every layout that the trainer accepts."""
    for tensor in _divisors(world_size):
        if machine.gpus_per_node % tensor or not _splits(shape, tensor):
            continue
        for pipe in _divisors(world_size // tensor):
            data = world_size // tensor // pipe
            if pipe > shape.num_layers or global_batch % data:
                continue
            for micro_batch in _divisors(global_batch // data):
                for recompute in RECOMPUTE:
                    steps = global_batch // data // micro_batch
                    yield ParallelLayout(tensor, pipe, data, micro_batch, steps, recompute)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _splits(shape: LlamaShape, tensor: int) -> bool:
    try:
        shape.check_tensor_parallel(tensor)
    except ValueError:
        return False
    return True


def _candidate(
    shape: LlamaShape, layout: ParallelLayout, seq_length: int, machine: Machine, precision: str
) -> Candidate:
    stages = plan_memory(shape, layout, seq_length, precision)
    fullest: StageMemory = max(stages, key=lambda stage: stage.peak)
    return Candidate(layout, estimate(shape, layout, seq_length, machine), fullest.peak, fullest.stage)


def _later(
    shape: LlamaShape,
    today: list[ParallelLayout],
    seq_length: int,
    machine: Machine,
    precision: str,
    limit: int,
    best: Candidate | None,
) -> list[Candidate]:
    """The fastest that fits of each thing the trainer lacks, alone and together, if it beats today's best."""
    kinds: dict[str, list[ParallelLayout]] = {}
    for layout in today:
        for name, variant in _variants(layout, shape.num_layers):
            kinds.setdefault(name, []).append(variant)
    found = []
    for name, variants in kinds.items():
        timed = sorted(
            ((estimate(shape, v, seq_length, machine), v) for v in variants), key=lambda e: -e[0].tokens_per_second
        )
        for time, variant in timed:
            if best and time.tokens_per_second <= best.tokens_per_second:
                break
            candidate = _candidate(shape, variant, seq_length, machine, precision)
            if candidate.peak_bytes <= limit:
                gain = f", {time.tokens_per_second / best.tokens_per_second - 1:+.0%}" if best else ""
                found.append(replace(candidate, reason=name + gain))
                break
    return sorted(found, key=lambda candidate: -candidate.tokens_per_second)


def _variants(layout: ParallelLayout, num_layers: int) -> Iterator[tuple[str, ParallelLayout]]:
    chunks = [
        v
        for v in range(2, num_layers // layout.pipe + 1)
        if layout.pipe > 1 and num_layers % (layout.pipe * v) == 0 and layout.num_micro_batches % layout.pipe == 0
    ]
    interleaved = [replace(layout, virtual_stages=v) for v in chunks]
    for variant in interleaved:
        yield "interleaving", variant
    if layout.recompute == "none":
        yield "selective recomputation", replace(layout, recompute="selective")
    if layout.tensor > 1:
        yield "sequence parallelism", replace(layout, sequence_parallel=True)
        for variant in interleaved:
            yield "sequence parallelism and interleaving", replace(variant, sequence_parallel=True)


def _too_large(candidate: Candidate, limit: int) -> str:
    return f"stage {candidate.fullest_stage} needs {candidate.peak_bytes / GIB:.1f} of {limit / GIB:.0f} GiB"


PHRASES = {
    "bubble": "bubble {:.0%} of the step",
    "tensor_parallel": "tensor-parallel traffic {:.0%}",
    "gradient_reduction": "gradient reduction {:.0%}",
    "parameter_gather": "gather of weights {:.0%}",
    "pipeline_messages": "messages between stages {:.0%}",
    "gemm": "matrix products {:.0%}",
    "attention": "attention {:.0%}",
    "memory_bound": "memory traffic {:.0%}",
    "optimizer": "optimizer {:.0%}",
    "waiting": "waiting for the slowest {:.0%}",
}


def _behind(candidate: Candidate, best: Candidate | None) -> str:
    """What costs a layout most, against the best one, in seconds of a step."""
    if best is None or candidate.layout == best.layout:
        return "the fastest that fits"
    mine, theirs = candidate.estimate.parts, best.estimate.parts
    part = max(mine, key=lambda name: mine[name] - theirs[name])
    if part in ("gemm", "attention", "memory_bound") and candidate.layout.recompute != best.layout.recompute:
        return "recomputes every layer"
    phrase = PHRASES[part].format(mine[part] / candidate.estimate.step_seconds)
    return f"{phrase}, {theirs[part] / best.estimate.step_seconds:.0%} in the best"


def _table(candidates: list[Candidate], best: Candidate | None) -> list[str]:
    rows = [("TP", "PP", "DP", "micro", "accum", "recompute", "tok/s/GCD", "TF NeoX", "TF Megatron", "GiB", "")]
    for candidate in candidates:
        layout, time = candidate.layout, candidate.estimate
        flops = time.tflops_per_gcd
        rows.append(
            (
                str(layout.tensor),
                str(layout.pipe) + (f" v{layout.virtual_stages}" if layout.virtual_stages > 1 else ""),
                str(layout.data),
                str(layout.micro_batch),
                str(layout.num_micro_batches),
                layout.recompute + (" +SP" if layout.sequence_parallel else ""),
                f"{time.tokens_per_second_per_gcd:.1f}",
                f"{flops['neox']:.1f}",
                f"{flops['megatron']:.1f}",
                f"{candidate.peak_bytes / GIB:.1f}",
                candidate.reason,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(item.ljust(width) for item, width in zip(row, widths, strict=True)).rstrip() for row in rows]
