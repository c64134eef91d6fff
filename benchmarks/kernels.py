"""Bandwidth of the fused ops at Llama-3.1 shapes, compared with other installed implementations.

    python benchmarks/kernels.py [--device auto] [--json F] [--plot F.png]

Useful bytes (the minimum an operation must read and write) over time, as a fraction of the copy bandwidth of the
same run, with cold caches; median of many runs with quartiles. Layouts: TP 1, TP 8, and TP 8 with sequence parallelism,
where a rank's norms have an eighth of the rows. Without a GPU it measures the PyTorch reference path against torch's
own operations, in fp32, on fewer tokens, and says so. The optimizer step is torch's, as in every run, next to apex's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import kernels_peers as peers
from benchmarks.kernels_peers import EPS, Function
from benchmarks.kernels_picture import draw
from megatron import ops
from megatron.ops.bandwidth import Clock
from megatron.ops.kernel_checks import rotary_tables

VOCABULARY = 128256
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Model:
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 128


MODELS = {"8B": Model(4096, 14336, 32, 8), "70B": Model(8192, 28672, 64, 8)}


@dataclass(frozen=True)
class Layout:
    tensor_parallel: int
    sequence_parallel: bool = False

    def __str__(self) -> str:
        return f"TP {self.tensor_parallel}" + (" with sequence parallelism" if self.sequence_parallel else "")


LAYOUTS = (Layout(1), Layout(8), Layout(8, sequence_parallel=True))


@dataclass(frozen=True)
class Goal:
    """Forward and backward: minimum bytes moved per 16-bit element, and targets as a fraction of copy bandwidth."""

    least: tuple[int, int]
    h100: tuple[float, float]
    mi250x: tuple[float, float]

    def target(self, direction: str, on_amd: object) -> float:
        return (self.mi250x if on_amd else self.h100)[DIRECTIONS.index(direction)]


GOALS = {
    "rms_norm": Goal((4, 6), (0.95, 0.75), (0.90, 0.75)),
    "add_rms_norm": Goal((8, 8), (0.92, 0.75), (0.90, 0.75)),
    "rotary": Goal((4, 4), (0.90, 0.90), (0.88, 0.88)),
    "swiglu": Goal((6, 10), (0.95, 0.90), (0.92, 0.90)),
    "cross_entropy": Goal((2, 4), (0.95, 0.95), (0.85, 0.85)),
}
ADAM_BYTES = 28  # a parameter: weight, gradient and two moments read, weight and moments written, in fp32
ADAM_PARAMETERS = {"cuda": 1 << 28, "cpu": 1 << 20}


@dataclass(frozen=True)
class Problem:
    """Inputs of one operation at one shape; `elements` of the main tensor; `leaves` receive gradients."""

    op: str
    elements: int
    inputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    contenders: dict[str, Function]


@dataclass(frozen=True)
class Result:
    op: str
    direction: str
    model: str
    layout: str
    tokens: int
    who: str
    milliseconds: float
    low: float
    high: float
    gigabytes_per_second: float
    of_copy: float
    target: float | None


def problems(model: Model, layout: Layout, tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Problem]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    tp = layout.tensor_parallel
    rows = tokens // tp if layout.sequence_parallel else tokens
    x, residual, weight = random(rows, 1, model.hidden), random(rows, 1, model.hidden), random(model.hidden)
    contenders: dict[str, Function] = {
        "ours": lambda x, w: ops.rms_norm(x, w, EPS),
        "torch": lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS),
        **peers.norms(model.hidden, weight),
    }
    yield Problem("rms_norm", x.numel(), (x, weight), (x, weight), contenders)

    def add_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, F.rms_norm(total, (total.shape[-1],), w, EPS)

    contenders = {"ours": lambda x, r, w: ops.add_rms_norm(x, r, w, EPS), "torch": add_norm}
    yield Problem("add_rms_norm", x.numel(), (x, residual, weight), (x, residual, weight), contenders)
    del x, residual
    if layout.sequence_parallel:
        return  # the operations between the matrix products have the same shapes as without it

    heads, kv_heads, d = model.heads // tp, max(1, model.kv_heads // tp), model.head_dim
    packed = random(tokens, 1, (heads + 2 * kv_heads) * d).detach()
    q, k, _ = packed.unflatten(-1, (heads + 2 * kv_heads, d)).split((heads, kv_heads, kv_heads), -2)
    q, k = q.requires_grad_(), k.requires_grad_()
    cos, sin = rotary_tables(tokens, d // 2, device)
    wide = [torch.cat((t, t), -1)[:, None, None].to(dtype) for t in (cos, sin)]

    def turn(t: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        return t * wide[0] + torch.cat((-t[..., half:], t[..., :half]), -1) * wide[1]

    contenders = {
        "ours": lambda q, k: ops.apply_rotary(q, k, cos, sin),
        "torch": lambda q, k: (turn(q), turn(k)),
        **peers.rotary(torch.cat((torch.atan2(sin, cos),) * 2, -1)[:, None, None]),
    }
    yield Problem("rotary", q.numel() + k.numel(), (q, k), (q, k), contenders)
    del packed, q, k

    def torch_swiglu(fused: Tensor) -> Tensor:
        up, gate = fused.chunk(2, -1)
        return F.silu(gate) * up

    fused = random(tokens, 1, 2 * model.ffn // tp)
    contenders = {"ours": ops.swiglu, "torch": torch_swiglu, **peers.swiglu()}
    yield Problem("swiglu", fused.numel() // 2, (fused,), (fused,), contenders)
    del fused

    # One rank's columns, treated as the whole vocabulary: the collective between the passes is not timed.
    columns = VOCABULARY // tp
    logits, labels = random(tokens, columns), torch.randint(0, columns, (tokens,), device=device)
    contenders = {
        "ours": lambda x, labels: ops.vocab_parallel_cross_entropy(x, labels, None, 0, columns),
        "torch": lambda x, labels: F.cross_entropy(x.float(), labels, reduction="none"),
        **peers.cross_entropy(),
    }
    yield Problem("cross_entropy", logits.numel(), (logits, labels), (logits,), contenders)


def measure(problem: Problem, clock: Clock, runs: int, compiled: bool) -> Iterator[tuple[str, str, list[float], float]]:
    """(direction, contender, [median, low, high] seconds, useful bytes per second)."""
    contenders = dict(problem.contenders)
    if compiled:
        contenders["torch.compile"] = torch.compile(contenders["torch"], dynamic=False)
    size = problem.inputs[0].element_size() / 2
    for who, function in contenders.items():
        try:
            results = function(*problem.inputs)
            results = results if isinstance(results, tuple) else (results,)
            gradients = [torch.randn_like(r) for r in results]

            def forward(function: Function = function) -> object:
                with torch.no_grad():
                    return function(*problem.inputs)

            def backward(results: tuple[Tensor, ...] = results, gradients: list[Tensor] = gradients) -> object:
                return torch.autograd.grad(results, problem.leaves, gradients, retain_graph=True)

            for direction, work in zip(DIRECTIONS, (forward, backward), strict=True):
                timing = clock.time(work, runs)
                useful = problem.elements * size * GOALS[problem.op].least[DIRECTIONS.index(direction)]
                yield direction, who, [timing.median, timing.low, timing.high], useful / timing.median
        except Exception as error:  # report an implementation that does not run here, and continue
            if who == "ours":
                raise
            print(f"{problem.op}: {who} does not run here: {type(error).__name__}: {str(error)[:200]}")


def adam_steps(clock: Clock, runs: int) -> dict[str, float]:
    """Useful bytes per second of one fp32 optimizer step, by implementation."""
    makers = {"torch": lambda p: torch.optim.AdamW(p, weight_decay=0.1, fused=True), **peers.adam()}
    rates = {}
    for who, make in makers.items():
        parameter = torch.zeros(ADAM_PARAMETERS[clock.device.type], device=clock.device).requires_grad_()
        parameter.grad = torch.ones_like(parameter)
        rates[who] = ADAM_BYTES * parameter.numel() / clock.time(make([parameter]).step, runs).median
    return rates


def table(results: list[Result]) -> str:
    lines = [
        "| op | direction | model | layout | who | ms (quartiles) | GB/s | of copy | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        times = f"{r.milliseconds:.3f} ({r.low:.3f}-{r.high:.3f})"
        lines.append(
            f"| {r.op} | {r.direction} | {r.model} | {r.layout} | {r.who} | {times} "
            f"| {r.gigabytes_per_second:.1f} | {r.of_copy:.2f} | {'' if r.target is None else f'{r.target:.2f}'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="write a figure (PNG) to this file")
    parser.add_argument("--tokens", type=int, help="tokens of a micro-batch; default 8192, on the CPU 256")
    parser.add_argument("--runs", type=int, help="runs of each function; default 50, on the CPU 7")
    parser.add_argument("--models", default="8B,70B")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    args = parser.parse_args()
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device, on_cpu = torch.device(kind), kind == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    tokens, runs = args.tokens or (256 if on_cpu else 8192), args.runs or (7 if on_cpu else 50)
    said = ops.configure("auto", device)
    name = "CPU" if on_cpu else torch.cuda.get_device_name()
    clock = Clock(device)
    copy = clock.copy_bandwidth()
    print(f"{name}, {dtype}, {tokens} tokens, {said}; copy {copy / 1e9:.1f} GB/s; torch {torch.__version__}")
    if on_cpu:
        print("no GPU: this measures the PyTorch references against torch's own operations, not the kernels")
    results = []
    for model, layout in itertools.product(args.models.split(","), LAYOUTS):
        for problem in problems(MODELS[model], layout, tokens, dtype, device):
            for direction, who, seconds, rate in measure(problem, clock, runs, not args.no_compile):
                target = None if on_cpu or who != "ours" else GOALS[problem.op].target(direction, torch.version.hip)
                times = [1e3 * t for t in seconds]
                results.append(
                    Result(
                        problem.op, direction, model, str(layout), tokens, who, *times, rate / 1e9, rate / copy, target
                    )
                )
            torch.compiler.reset()
    print(table(results))
    adam = {who: rate / copy for who, rate in adam_steps(clock, runs).items()}
    print("optimizer step, fraction of copy:", ", ".join(f"{who} {rate:.2f}" for who, rate in adam.items()))
    report = {"device": name, "dtype": str(dtype), "copy_gb_per_s": copy / 1e9, "choice": said, "adam_of_copy": adam}
    report["results"] = [asdict(r) for r in results]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        draw(report, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
