"""The planner's time model compared with published runs, and its search for the 70B on 2,048 GCDs.

    python benchmarks/planner.py [--json FILE] [--write docs/planning.md]

Prints predicted and published speed of every run in `published_runs.py`, the median and the worst error, the same with
each run left out of the calibration, and the layouts found by `megatron.planner.search`. `--write` puts the tables
between the markers of a Markdown file. Nothing is measured: it takes a few seconds on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.published_runs import EXCLUDED, LLAMA_70B, RUNS, PublishedRun  # noqa: E402
from megatron.model.flops import megatron_flops_per_token, neox_flops_per_token  # noqa: E402
from megatron.planner.cost import compute, traffic  # noqa: E402
from megatron.planner.cost.estimate import Estimate, estimate  # noqa: E402
from megatron.planner.cost.machines import FRONTIER, MACHINES  # noqa: E402
from megatron.planner.cost.reliability import budget, reliability  # noqa: E402
from megatron.planner.search import HEADER, Candidate, SearchResult, row, search  # noqa: E402

# The constants that no source gives, and the values among which calibration chooses.
FREE: dict[str, Sequence[float]] = {
    "sustained": [share / 100 for share in range(60, 101)],
    "collective": [share / 20 for share in range(8, 21)],
}
UNITS = {"neox": "TFLOP/s, NeoX", "megatron": "TFLOP/s, Megatron", "tokens": "tokens/s"}


BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"
WORLD, SEQ = 2048, 8192
BATCHES = (512, 1024)
TOKENS = 10e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this Markdown file")
    options = parser.parse_args()
    for name, block in sections().items():
        print(f"# {name}\n\n{block}\n")
    if options.write:
        options.write.write_text(fill(options.write.read_text()))
    if options.json:
        options.json.write_text(json.dumps(figures(), indent=1) + "\n")
    return 0


def sections() -> dict[str, str]:
    """Markdown by the name of its markers."""
    return {"published": published_section(), "search": search_section()}


def fill(text: str) -> str:
    """`text` with every section between its markers; ValueError if a marker is missing."""
    for name, block in sections().items():
        begin, end = BEGIN.format(name), END.format(name)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{begin} and {end} must each stand in the file once")
        head, rest = text.split(begin)
        text = head + begin + "\n" + block + "\n" + end + rest.split(end)[1]
    return text


@dataclass(frozen=True)
class Replay:
    run: PublishedRun
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.run.published - 1.0


def replay(run: PublishedRun, **constants: float) -> Replay:
    """Predict a published run's own measure; `constants` replace the machine's."""
    machine = replace(MACHINES[run.machine], **constants)  # type: ignore[arg-type]
    machine = replace(machine, sustained=machine.sustained * run.speed)
    planned = estimate(run.shape, run.layout, run.seq_length, machine)
    forward, backward, _ = compute.layer_seconds(run.shape, run.layout, run.seq_length, machine)
    seconds = _sharded_seconds(planned) if run.sharded else planned.step_seconds
    more = forward.total * run.more_forward_layers + backward.total * run.more_backward_layers
    if run.half_recompute:
        more += (forward.gemm / 2 + forward.memory_bound) * run.shape.num_layers
    if run.keeps_gathered:
        half = traffic.half_bytes(run.shape, run.layout, run.seq_length) / traffic.tensor_rate(run.layout, machine)
        more -= 2 * half * run.shape.num_layers * run.layout.num_micro_batches
    seconds += more * planned.waiting
    tokens = planned.tokens_per_step / seconds / run.layout.world_size
    return Replay(run, tokens * _flops_per_token(run))


def _sharded_seconds(planned: Estimate) -> float:
    """Seconds of an FSDP step: bf16 weights gathered for the forward and again for the backward pass and fp32 gradients
    scattered, both hidden by computation as far as possible; the optimizer on one shard."""
    layout, parameters = planned.layout, planned.stages[0].parameters
    computing = sum(stage.total - stage.accumulation for stage in planned.stages) * layout.num_micro_batches
    moved = traffic.ring_bytes(layout.data, parameters) / 2 * (2 * traffic.BF16 + traffic.FP32)
    moving = moved / traffic.data_rate(layout, planned.machine) * layout.num_micro_batches
    return (max(computing, moving) + planned.optimizer_seconds / layout.data) * planned.waiting


def _flops_per_token(run: PublishedRun) -> float:
    """TFLOPs by the run's own formula; 1 if it reports tokens."""
    if run.metric == "tokens":
        return 1.0
    if run.metric == "neox":
        return neox_flops_per_token(run.shape, run.seq_length, run.layout.recompute == "full") / 1e12
    one = replace(run.shape, num_layers=1)
    two = replace(run.shape, num_layers=2)
    layer = megatron_flops_per_token(two, run.seq_length) - megatron_flops_per_token(one, run.seq_length)
    more = layer * (run.more_forward_layers + 2 * run.more_backward_layers) / 3
    return (megatron_flops_per_token(run.shape, run.seq_length) + more) / 1e12


def calibrate(runs: Sequence[PublishedRun]) -> dict[str, float]:
    """The free constants with the smallest mean |log error|."""
    errors = _errors_on_grid()
    counted = [run.name for run in runs if run.calibrates]

    def badness(values: tuple[float, ...]) -> float:
        return statistics.mean(abs(math.log1p(errors[values][name])) for name in counted)

    return dict(zip(FREE, min(errors, key=badness), strict=True))


@lru_cache
def _errors_on_grid() -> dict[tuple[float, ...], dict[str, float]]:
    grid = itertools.product(*FREE.values())
    return {
        values: {run.name: replay(run, **dict(zip(FREE, values, strict=True))).error for run in RUNS} for values in grid
    }


def left_out(runs: Sequence[PublishedRun]) -> list[Replay]:
    """Each run predicted with constants calibrated on all the others."""
    return [replay(run, **calibrate([other for other in runs if other is not run])) for run in runs]


def figures() -> dict[str, Any]:
    """The content of `--json`."""
    return {
        "constants": {name: getattr(FRONTIER, name) for name in FREE},
        "runs": [
            {
                "name": result.run.name,
                "unit": UNITS[result.run.metric],
                "published": result.run.published,
                "predicted": result.predicted,
                "error": result.error,
                "error_left_out": outside.error,
            }
            for result, outside in zip(map(replay, RUNS), left_out(RUNS), strict=True)
        ],
        "search": {batch: searched(batch).as_json() for batch in BATCHES},
    }


def published_section() -> str:
    """Every run, predicted with the planner's constants and with constants calibrated without it."""
    results, outside = [replay(run) for run in RUNS], left_out(RUNS)
    rows = [("run", "GCDs", "layout", "unit", "published", "predicted", "error", "error when left out")]
    notes = []
    for result, other in zip(results, outside, strict=True):
        run = result.run
        remarks = [text for text in (run.assumed and f"assumed: {run.assumed}", run.caution) if text]
        if remarks:
            notes.append(f"{len(notes) + 1}. {run.name}: {'; '.join(remarks)}. Source: {run.source}.")
        rows.append(
            (
                run.name + (f" [{len(notes)}]" if remarks else ""),
                f"{run.layout.world_size:,}",
                describe(run),
                UNITS[run.metric],
                f"{run.published:g}",
                f"{result.predicted:.0f}" if run.metric == "tokens" else f"{result.predicted:.1f}",
                f"{result.error:+.0%}",
                f"{other.error:+.0%}",
            )
        )
    unused = " and ".join(run.name for run in RUNS if not run.calibrates)
    excluded = "; ".join(f"{name}: {why}" for name, why in EXCLUDED.items())
    return "\n".join(
        [
            *_markdown(rows),
            "",
            f"Calibrated on all but the {unused}: {_constants(calibrate(RUNS))}. Absolute error: {_spread(results)}.",
            "",
            f"Each run left out of the calibration in turn: {_spread(outside)}; the constants then are "
            f"{_ranges([calibrate([other for other in RUNS if other is not run]) for run in RUNS])}.",
            "",
            *notes,
            "",
            f"AstroSage-70B's global batch is not published: {_batches(RUNS[0])}.",
            "",
            f"Not replayed. {excluded}.",
        ]
    )


def _batches(run: PublishedRun) -> str:
    """A run's prediction with half as many, as many and twice as many micro-batches."""
    steps = [run.layout.num_micro_batches * factor // 2 for factor in (1, 2, 4)]
    runs = [replace(run, layout=replace(run.layout, num_micro_batches=number)) for number in steps]
    return ", ".join(f"{replay(other).predicted:.1f} with {other.layout.global_batch:,} sequences" for other in runs)


def describe(run: PublishedRun) -> str:
    layout = run.layout
    kind = "FSDP" if run.sharded else "DP"
    recompute = "half" if run.half_recompute else layout.recompute
    sequence = " SP" if layout.sequence_parallel else ""
    return (
        f"TP{layout.tensor}{sequence} PP{layout.pipe} {kind}{layout.data}, {layout.micro_batch} x "
        f"{layout.num_micro_batches} x {run.seq_length:,}, recompute {recompute}"
    )


def _constants(constants: dict[str, float]) -> str:
    return ", ".join(f"`{name}` {value:.2f}" for name, value in constants.items())


def _ranges(fits: Sequence[dict[str, float]]) -> str:
    low = {name: min(fit[name] for fit in fits) for name in FREE}
    high = {name: max(fit[name] for fit in fits) for name in FREE}
    return ", ".join(f"`{name}` {low[name]:.2f} to {high[name]:.2f}" for name in FREE)


def _spread(results: Sequence[Replay]) -> str:
    errors = sorted(abs(result.error) for result in results)
    beyond = [result.run.name for result in results if abs(result.error) > 0.25]
    text = f"median {statistics.median(errors):.0%}, worst {errors[-1]:.0%}"
    if beyond:
        inside = max(error for error in errors if error <= 0.25)
        text += (
            f"; beyond 25 % {' and '.join(beyond)}, without {'them' if beyond[1:] else 'it'} the worst is {inside:.0%}"
        )
    return text


@lru_cache
def searched(batch: int) -> SearchResult:
    """All layouts of the 70B at `batch` sequences per step."""
    return search(LLAMA_70B, WORLD, batch, SEQ, FRONTIER)


def search_section() -> str:
    """What the search finds for the 70B on 2,048 GCDs, against AstroSage's layout at the same global batch."""
    blocks = []
    for batch in BATCHES:
        found = searched(batch)
        astrosage, best = found.find(8, 8, 1), found.best
        interleaved = found.find(8, 8, 1, "none", True, "megatron", 5)
        assert astrosage
        assert best
        assert interleaved
        blocks += [
            f"**{batch} sequences a step** ({batch * SEQ / 1e6:.1f} million tokens).",
            "",
            f"- AstroSage's layout, TP8 PP8 DP32 with micro-batches of 1: {_speeds(astrosage)}.",
            f"- The fastest under DeepSpeed: {_against(found.of_engine('deepspeed')[0], astrosage)}.",
            f"- `configs/llama31_70b/interleaved.yml`, five virtual stages: {_against(interleaved, astrosage)}.",
            f"- The fastest of all: {_against(best, astrosage)}.",
            "",
            *_markdown([(*HEADER[:-1], "what holds it back"), *map(row, found.ranked[:8])]),
            "",
            "With `engine: deepspeed`:",
            "",
            *_markdown([(*HEADER[:-1], "what holds it back"), *map(row, found.of_engine("deepspeed")[:6])]),
            "",
            f"{len(found.lost)} layouts are too large, among them the fastest of all:",
            "",
            *_markdown([HEADER, *map(row, found.lost[:3])]),
            "",
        ]
    return "\n".join([*blocks, _cost(searched(BATCHES[0]))])


def _against(candidate: Candidate, astrosage: Candidate) -> str:
    time = candidate.estimate
    text = f"{_speeds(candidate)}, {candidate.tokens_per_second / astrosage.tokens_per_second - 1:+.0%}"
    if time.hidden_seconds:
        exposed = time.tokens_per_step / time.exposed_step_seconds / time.layout.world_size
        text += (
            f"; {exposed:.1f} tokens/s if none of the {time.hidden_seconds:.1f} s of reduction and gather hid that are "
            f"taken to hide in a step of {time.step_seconds:.1f} s"
        )
    return text


def _cost(found: SearchResult) -> str:
    best = found.best
    assert best
    time = best.estimate
    saving, plan = reliability(time), budget(time, TOKENS)
    return (
        f"With the fastest layout of {found.global_batch} sequences, {TOKENS / 1e9:.0f} billion tokens are "
        f"{plan.steps:,} steps, {plan.days:.1f} days and {plan.node_hours:,.0f} node-hours on {time.nodes} nodes. A "
        f"checkpoint has {time.checkpoint_bytes / 1e9:.0f} GB, written in {saving.save_seconds:.0f} s at an assumed "
        f"{time.machine.file_system_rate / 1e9:.0f} GB/s. With an assumed failure of one node in "
        f"{time.machine.node_mtbf_seconds / 3600:,.0f} hours the job is interrupted every "
        f"{saving.mean_time_to_interrupt / 3600:.0f} hours; saving every {saving.save_interval / 60:.0f} minutes then "
        f"loses least: {saving.lost_to_saves:.1%} of the time to saves that block, {saving.lost_to_failures:.1%} to "
        f"work done again and restarts of {time.machine.restart_seconds / 60:.0f} minutes."
    )


def _speeds(candidate: Candidate) -> str:
    flops = candidate.estimate.tflops_per_gcd
    return (
        f"{candidate.estimate.tokens_per_second_per_gcd:.1f} tokens/s per GCD, {flops['neox']:.1f} TFLOP/s by "
        f"GPT-NeoX's formula (HFU), {flops['megatron']:.1f} by Megatron's (MFU)"
    )


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(line) + " |" for line in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


if __name__ == "__main__":
    sys.exit(main())
