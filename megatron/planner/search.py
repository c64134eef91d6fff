"""All layouts of a number of GCDs and a global batch, ranked by predicted tokens per second, with what limits each.

    result = search(shape, world_size, global_batch, seq_length, machine)
    result.ranked        candidates that fit, fastest first
    result.lost          candidates that do not fit, each with its reason
    result.lines()       all of it as text; result.as_json() for scripts

Time is `planner.cost.estimate`'s, memory `planner.cost.memory`'s. Only layouts that `NeoXArgs` accepts are tried:
tensor parallelism divides heads, key/value heads, MLP width and vocabulary and stays inside a node, every stage has a
layer, micro-batch x accumulation x data parallel is the global batch, and sequence parallelism needs several
tensor-parallel ranks that divide the sequence. Both engines are tried: megatron-core's overlaps what it can, and has
virtual stages where pipeline stages divide the micro-batches and all virtual stages have the same length. Layouts
recompute nothing, everything or, if memory lies in between, the fewest layers that fit; those of megatron-core, which
are many, recompute only where storing everything does not fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron.common.columns import align_columns
from megatron.layout import LlamaShape, padded_vocab_size
from megatron.planner.cost.compute import gemm_seconds, layer_matrices
from megatron.planner.cost.estimate import Estimate, estimate
from megatron.planner.cost.machines import GIB, LINK_NAMES, Machine, ring_rate
from megatron.planner.cost.memory import StageMemory, candidates_for_fullest, fewest_recomputed, plan_memory
from megatron.planner.cost.parallel_layout import EngineName, ParallelLayout, Recompute

RECOMPUTE: tuple[Recompute, ...] = ("none", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout, its cost, and in `reason` what limits it."""

    layout: ParallelLayout
    estimate: Estimate
    fullest: StageMemory  # the stage that needs the most
    reason: str = ""

    @property
    def peak_bytes(self) -> int:
        return self.fullest.peak

    @property
    def tokens_per_second(self) -> float:
        return self.estimate.tokens_per_second


@dataclass(frozen=True)
class SearchResult:
    machine: Machine
    seq_length: int
    global_batch: int
    usable_bytes: int  # of a GCD's memory
    ranked: list[Candidate]
    lost: list[Candidate]  # too large, fastest first

    @property
    def best(self) -> Candidate | None:
        return self.ranked[0] if self.ranked else None

    def of_engine(self, engine: EngineName) -> list[Candidate]:
        """The candidates of `ranked` that run with `engine`."""
        return [candidate for candidate in self.ranked if candidate.layout.engine == engine]

    def find(
        self,
        tensor: int,
        pipe: int,
        micro_batch: int,
        recompute: Recompute = "full",
        sequence_parallel: bool = False,
        engine: EngineName = "deepspeed",
        virtual_stages: int = 1,
    ) -> Candidate | None:
        """The candidate with these sizes, fitting or not."""
        for candidate in self.ranked + self.lost:
            layout = candidate.layout
            sizes = (layout.tensor, layout.pipe, layout.micro_batch, layout.engine, layout.virtual_stages)
            modes = (layout.recompute, layout.recompute_layers, layout.sequence_parallel)
            wanted = (tensor, pipe, micro_batch, engine, virtual_stages)
            if sizes == wanted and modes == (recompute, None, sequence_parallel):
                return candidate
        return None

    def as_json(self, top: int | None = None) -> dict[str, Any]:
        """The first `top` of each list, for scripts."""
        return {
            "usable_bytes": self.usable_bytes,
            "ranked": [_json(candidate) for candidate in self.ranked[:top]],
            "lost": [_json(candidate) for candidate in self.lost[:top]],
        }

    def lines(self, top: int = 10) -> list[str]:
        """Tables as text: the `top` fastest, the fastest of DeepSpeed's if none of those is, and the fastest that do
        not fit."""
        lines = _table(self.ranked[:top])
        if not self.ranked:
            lines = [f"no layout fits {self.usable_bytes / GIB:.0f} GiB a GCD"]
        others = self.of_engine("deepspeed")
        if others and others[0] not in self.ranked[:top]:
            lines += ["", "the fastest with engine: deepspeed:", *_table(others[:5])]
        if self.lost:
            lines += ["", f"{len(self.lost)} do not fit; the fastest of them:", *_table(self.lost[:5])]
        return lines


def search(
    shape: LlamaShape,
    world_size: int,
    global_batch: int,
    seq_length: int,
    machine: Machine,
    *,
    precision: str = "bfloat16",
    usable_bytes: int | None = None,
    vocab_divisible_by: int | None = None,
    isolate_documents: bool = False,
) -> SearchResult:
    """All legal layouts of `world_size` GCDs and `global_batch` sequences per step, ranked.

    `usable_bytes` is the memory of a GCD that a layout may take, by default the machine's. `vocab_divisible_by` is
    GPT-NeoX's `make_vocab_size_divisible_by`: if given, the vocabulary is padded for every tensor-parallel size anew;
    otherwise the shape's padding stays. Raises ValueError if there is no legal layout.
    """
    limit = machine.usable_hbm_bytes if usable_bytes is None else usable_bytes
    plan = _Planner(shape, seq_length, machine, precision, vocab_divisible_by, isolate_documents)
    found = [plan.candidate(layout) for layout in plan.layouts(world_size, global_batch)]
    if not found:
        raise ValueError(
            f"no layout of {world_size} GCDs fits a global batch of {global_batch} sequences: data-parallel ranks must "
            f"divide it, with tensor-parallel sizes that divide the model's heads and a node's {machine.gpus_per_node}"
        )
    found += [plan.candidate(layout) for layout in plan.storing_less(found, limit)]
    found += [plan.candidate(layout) for layout in plan.between(found, limit)]
    found.sort(key=lambda candidate: -candidate.tokens_per_second)
    fitting = [candidate for candidate in found if candidate.peak_bytes <= limit]
    best = fitting[0] if fitting else None
    ranked = [replace(candidate, reason=_behind(candidate, best)) for candidate in fitting]
    lost = [replace(c, reason=_too_large(c, limit)) for c in found if c.peak_bytes > limit]
    return SearchResult(machine, seq_length, global_batch, limit, ranked, lost)


@dataclass(frozen=True)
class _Planner:
    """Generates candidate layouts and computes their cost; its fields are common to all of them."""

    shape: LlamaShape
    seq_length: int
    machine: Machine
    precision: str
    vocab_divisible_by: int | None
    isolate_documents: bool

    def shape_at(self, tensor: int) -> LlamaShape:
        if self.vocab_divisible_by is None:
            return self.shape
        padded = padded_vocab_size(self.shape.vocab_size, self.vocab_divisible_by, tensor)
        return replace(self.shape, padded_vocab_size=padded)

    def layouts(self, world_size: int, global_batch: int) -> Iterator[ParallelLayout]:
        """Every layout that the trainer accepts."""
        for tensor in _divisors(world_size):
            if self.machine.gpus_per_node % tensor or not _splits(self.shape_at(tensor), tensor):
                continue
            for pipe in _divisors(world_size // tensor):
                data = world_size // tensor // pipe
                if pipe > self.shape.num_layers or global_batch % data:
                    continue
                for micro_batch in _divisors(global_batch // data):
                    steps = global_batch // data // micro_batch
                    sizes = ParallelLayout(tensor, pipe, data, micro_batch, steps)
                    for layout, sliced in itertools.product(self.by_engine(sizes), self.slicing(tensor)):
                        for recompute in RECOMPUTE[: 2 if layout.engine == "deepspeed" else 1]:
                            yield replace(layout, recompute=recompute, sequence_parallel=sliced)

    def by_engine(self, layout: ParallelLayout) -> Iterator[ParallelLayout]:
        """`layout` with either engine, and with every number of virtual stages."""
        yield layout
        # the defaults of `overlap_grad_reduce` and `overlap_param_gather`
        megatron = replace(layout, engine="megatron", overlap_grad_reduce=True, overlap_param_gather=True)
        yield replace(megatron, overlap_param_gather=not self.shape.tied)
        if layout.pipe > 1 and layout.num_micro_batches % layout.pipe == self.shape.num_layers % layout.pipe == 0:
            for virtual in _divisors(self.shape.num_layers // layout.pipe)[1:]:
                yield replace(megatron, virtual_stages=virtual)

    def slicing(self, tensor: int) -> tuple[bool, ...]:
        """Without sequence parallelism, and with it where `tensor` ranks can divide the sequence."""
        return (False, True) if tensor > 1 and self.seq_length % tensor == 0 else (False,)

    def storing_less(self, found: list[Candidate], limit: int) -> Iterator[ParallelLayout]:
        """megatron-core's layouts that do not fit without recomputation, with selective and with full."""
        for candidate in found:
            if candidate.layout.engine == "megatron" and candidate.peak_bytes > limit:
                yield replace(candidate.layout, recompute="selective")
                yield replace(candidate.layout, recompute="full")

    def between(self, found: list[Candidate], limit: int) -> Iterator[ParallelLayout]:
        """Layouts that fit with full recomputation but not without, with the fewest recomputed layers that fit."""
        too_large = {candidate.layout for candidate in found if candidate.peak_bytes > limit}
        for candidate in found:
            layout = candidate.layout
            if (
                layout.recompute == "full"
                and layout not in too_large
                and replace(layout, recompute="none") in too_large
            ):
                partly = self.fewest(layout, limit)
                if partly is not None:
                    yield partly

    def fewest(self, layout: ParallelLayout, limit: int) -> ParallelLayout | None:
        """`layout` with the least recomputation that fits; None if all layers must be recomputed."""
        longest = -(-self.shape.num_layers // layout.pipe)
        layers = fewest_recomputed(layout, longest, lambda other: self.candidate(other).peak_bytes <= limit)
        return None if layers is None else replace(layout, recompute_layers=layers)

    def time(self, layout: ParallelLayout) -> Estimate:
        return estimate(self.shape_at(layout.tensor), layout, self.seq_length, self.machine)

    def candidate(self, layout: ParallelLayout) -> Candidate:
        stages = plan_memory(
            self.shape_at(layout.tensor),
            layout,
            self.seq_length,
            self.precision,
            isolate_documents=self.isolate_documents,
            machine=self.machine,
            only=candidates_for_fullest(layout.pipe),
        )
        return Candidate(layout, self.time(layout), max(stages, key=lambda stage: stage.peak))


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _splits(shape: LlamaShape, tensor: int) -> bool:
    try:
        shape.check_tensor_parallel(tensor)
    except ValueError:
        return False
    return True


def _too_large(candidate: Candidate, limit: int) -> str:
    kinds = candidate.fullest.by_kind
    most = max(kinds, key=lambda kind: kinds[kind])
    return (
        f"stage {candidate.fullest.stage} needs {candidate.peak_bytes / GIB:.1f} of {limit / GIB:.0f} GiB, "
        f"{kinds[most] / GIB:.1f} of it {most}"
    )


def _behind(candidate: Candidate, best: Candidate | None) -> str:
    """What slows a layout down most compared with the best one, in seconds of a step."""
    if best is None or candidate.layout == best.layout:
        return "the fastest that fits"
    mine, theirs = candidate.estimate.parts, best.estimate.parts
    part = max(mine, key=lambda name: mine[name] - theirs[name])
    layout = candidate.layout
    again = candidate.estimate.recomputed_share
    if part in ("gemm", "attention", "memory_bound", "waiting") and again > best.estimate.recomputed_share:
        return f"computes the forward of {'every layer' if again == 1 else f'{again:.0%} of the layers'} twice"
    ends = _imbalance(candidate.estimate)
    if part == "gemm" and ends > _imbalance(best.estimate) + 0.01:
        return f"the longest stage takes {ends:.0%} more than the average: the head is on the last"
    share = f"{mine[part] / candidate.estimate.step_seconds:.0%} of the step"
    match part:
        case "bubble":
            return f"bubble {share}: {layout.num_micro_batches} micro-batches through {layout.pipe} stages"
        case "tensor_parallel":
            what = "gathers and scatters" if layout.sequence_parallel else "all-reduces"
            return f"{what} of {layout.tensor} tensor-parallel ranks {share}, {_links(layout, candidate.estimate)}"
        case "gradient_reduction":
            return f"reduction of gradients over {layout.data} data-parallel ranks {share}"
        case "parameter_gather":
            return f"gather of weights over {layout.data} data-parallel ranks {share}"
        case "pipeline_messages":
            return f"messages between stages {share}"
        case "gemm":
            return f"smaller matrices: {_matrix_rate(candidate):.0f} TFLOP/s, {_matrix_rate(best):.0f} in the best"
        case _:
            return f"{part.replace('_', ' ')} {share}"


def _imbalance(time: Estimate) -> float:
    """How much longer the longest stage takes than the average one."""
    return time.slowest.total * len(time.stages) / sum(stage.total for stage in time.stages) - 1


def _links(layout: ParallelLayout, time: Estimate) -> str:
    return "over " + LINK_NAMES[ring_rate(tuple(sorted(time.machine.gcds(range(layout.tensor)))))]


def _matrix_rate(candidate: Candidate) -> float:
    """TFLOP/s of the forward products of a decoder layer."""
    time, layout = candidate.estimate, candidate.layout
    sizes = layer_matrices(time.shape, layout.tensor)
    tokens = layout.micro_batch * time.seq_length
    seconds = sum(gemm_seconds(tokens, features_in, features_out, time.machine) for features_in, features_out in sizes)
    return sum(2.0 * tokens * i * o for i, o in sizes) / seconds / 1e12


HEADER = ("engine", "TP", "PP", "DP", "micro", "accum", "recompute", "tok/s/GCD", "TF NeoX", "TF Megatron", "GiB", "")


def row(candidate: Candidate) -> tuple[str, ...]:
    """A candidate under `HEADER`: TFLOP/s of a GCD by both formulas, peak memory of its fullest stage."""
    layout, time = candidate.layout, candidate.estimate
    flops = time.tflops_per_gcd
    return (
        layout.engine,
        str(layout.tensor),
        str(layout.pipe) + (f" v{layout.virtual_stages}" if layout.virtual_stages > 1 else ""),
        str(layout.data),
        str(layout.micro_batch),
        str(layout.num_micro_batches),
        _recompute(candidate) + (" +SP" if layout.sequence_parallel else ""),
        f"{time.tokens_per_second_per_gcd:.1f}",
        f"{flops['neox']:.1f}",
        f"{flops['megatron']:.1f}",
        f"{candidate.peak_bytes / GIB:.1f}",
        candidate.reason,
    )


def _recompute(candidate: Candidate) -> str:
    layout = candidate.layout
    if layout.recompute_layers is None:
        return layout.recompute
    return f"{layout.recompute_layers} of {max(stage.layers for stage in candidate.estimate.stages)}"


def _json(candidate: Candidate) -> dict[str, Any]:
    return {
        "layout": asdict(candidate.layout),
        "tokens_per_second_per_gcd": candidate.estimate.tokens_per_second_per_gcd,
        "tflops_per_gcd": candidate.estimate.tflops_per_gcd,
        "peak_bytes": candidate.peak_bytes,
        "reason": candidate.reason,
    }


def _table(candidates: list[Candidate]) -> list[str]:
    return align_columns([HEADER, *map(row, candidates)])
