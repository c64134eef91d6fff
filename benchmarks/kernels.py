"""Bandwidth of the fused ops at Llama-3.1 shapes, compared with other installed implementations.

    python benchmarks/kernels.py [--device auto] [--json F] [--plot F.png]

Useful bytes (the minimum an operation must read and write) over time, as a fraction of the copy bandwidth measured in
the same run, with cold caches; median of many runs with quartiles. Without a GPU it compares the PyTorch reference path
with torch's own operations, in fp32, on fewer tokens, and says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import ops
from megatron.ops.bandwidth import Clock
from megatron.ops.kernel_checks import rotary_tables

EPS = 1e-5
VOCABULARY = 128256
DIRECTIONS = ("forward", "backward")
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Model:
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 128


MODELS = {"8B": Model(4096, 14336, 32, 8), "70B": Model(8192, 28672, 64, 8)}


@dataclass(frozen=True)
class Goal:
    """Forward and backward: minimum bytes moved per 16-bit element, and targets as a fraction of copy bandwidth."""

    least: tuple[int, int]
    h100: tuple[float, float]
    mi250x: tuple[float, float]


GOALS = {
    "rms_norm": Goal((4, 6), (0.95, 0.75), (0.90, 0.75)),
    "add_rms_norm": Goal((8, 8), (0.92, 0.75), (0.90, 0.75)),
    "rotary": Goal((4, 4), (0.90, 0.90), (0.88, 0.88)),
    "swiglu": Goal((6, 10), (0.95, 0.90), (0.92, 0.90)),
    "cross_entropy": Goal((2, 4), (0.95, 0.95), (0.85, 0.85)),
}


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
    tensor_parallel: int
    tokens: int
    who: str
    milliseconds: float
    low: float
    high: float
    gigabytes_per_second: float
    of_copy: float


def problems(model: Model, tp: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Problem]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    # Norms operate on whole rows: under sequence parallelism a rank has 1/tp of the tokens.
    rows = tokens // tp
    x, residual, weight = random(rows, 1, model.hidden), random(rows, 1, model.hidden), random(model.hidden)
    contenders: dict[str, Function] = {
        "ours": lambda x, w: ops.rms_norm(x, w, EPS),
        "torch": lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS),
        **other_norms(model.hidden, weight),
    }
    yield Problem("rms_norm", x.numel(), (x, weight), (x, weight), contenders)

    def add_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, F.rms_norm(total, (total.shape[-1],), w, EPS)

    contenders = {"ours": lambda x, r, w: ops.add_rms_norm(x, r, w, EPS), "torch": add_norm}
    yield Problem("add_rms_norm", x.numel(), (x, residual, weight), (x, residual, weight), contenders)
    del x, residual

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
    }
    yield Problem("rotary", q.numel() + k.numel(), (q, k), (q, k), contenders)
    del packed, q, k

    def torch_swiglu(fused: Tensor) -> Tensor:
        up, gate = fused.chunk(2, -1)
        return F.silu(gate) * up

    fused = random(tokens, 1, 2 * model.ffn // tp)
    contenders = {"ours": ops.swiglu, "torch": torch_swiglu, **other_swiglu()}
    yield Problem("swiglu", fused.numel() // 2, (fused,), (fused,), contenders)
    del fused

    # One rank's columns, treated as the whole vocabulary: the collective between the passes is not timed.
    columns = VOCABULARY // tp
    logits, labels = random(tokens, columns), torch.randint(0, columns, (tokens,), device=device)
    contenders = {
        "ours": lambda x, labels: ops.vocab_parallel_cross_entropy(x, labels, None, 0, columns),
        "torch": lambda x, labels: F.cross_entropy(x.float(), labels, reduction="none"),
        **other_cross_entropy(),
    }
    yield Problem("cross_entropy", logits.numel(), (logits, labels), (logits,), contenders)


def other_norms(hidden: int, weight: Tensor) -> dict[str, Function]:
    found: dict[str, Function] = {}
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        found["liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    except ImportError:
        pass
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        found["apex"] = lambda x, w: fused_rms_norm_affine(x, w, (hidden,), EPS)
    except ImportError:
        pass
    try:
        import transformer_engine.pytorch as te

        module = te.RMSNorm(hidden, eps=EPS, params_dtype=weight.dtype, device=weight.device)
        module.weight = torch.nn.Parameter(weight.detach())
        found["transformer engine"] = lambda x, w: torch.func.functional_call(module, {"weight": w}, (x,))
    except ImportError:
        pass
    return found


def other_swiglu() -> dict[str, Function]:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}

    def liger(fused: Tensor) -> Tensor:
        up, gate = fused.chunk(2, -1)
        out: Tensor = LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())
        return out

    return {"liger": liger}


def other_cross_entropy() -> dict[str, Function]:
    try:
        from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
    except ImportError:
        return {}
    loss = LigerCrossEntropyLoss(reduction="none")
    return {"liger": lambda x, labels: loss(x.clone(), labels)}  # it overwrites its input


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


def plot(results: list[Result], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = results[0]
    shown = [r for r in results if (r.model, r.tensor_parallel) == (first.model, first.tensor_parallel)]
    groups = list(dict.fromkeys((r.op, r.direction) for r in shown))
    contenders = list(dict.fromkeys(r.who for r in shown))
    figure, axes = pyplot.subplots(figsize=(11, 4.5))
    width = 0.8 / len(contenders)
    for i, who in enumerate(contenders):
        values = {(r.op, r.direction): r.of_copy for r in shown if r.who == who}
        places = [j + (i - (len(contenders) - 1) / 2) * width for j, g in enumerate(groups) if g in values]
        axes.bar(places, [values[g] for g in groups if g in values], width, label=who)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{op}\n{direction}" for op, direction in groups], fontsize=7)
    axes.set_ylabel("useful bytes per second, fraction of copy")
    axes.set_title(f"Llama-3.1-{first.model}, TP {first.tensor_parallel}, {first.tokens} tokens\n{title}", fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(results: list[Result], targets: bool) -> str:
    lines = [
        "| op | direction | model | TP | who | ms (quartiles) | GB/s | of copy | target H100 / MI250X |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        goal, which = GOALS[r.op], DIRECTIONS.index(r.direction)
        target = f"{goal.h100[which]:.2f} / {goal.mi250x[which]:.2f}" if targets and r.who == "ours" else ""
        times = f"{r.milliseconds:.3f} ({r.low:.3f}-{r.high:.3f})"
        lines.append(
            f"| {r.op} | {r.direction} | {r.model} | {r.tensor_parallel} | {r.who} | {times} "
            f"| {r.gigabytes_per_second:.1f} | {r.of_copy:.2f} | {target} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="write a figure (PNG) to this file")
    parser.add_argument("--tokens", type=int, help="tokens of a micro-batch; 8192, on the CPU 256")
    parser.add_argument("--runs", type=int, help="runs of each function; 50, on the CPU 7")
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
    for model in args.models.split(","):
        for tp in (1, 8):
            for problem in problems(MODELS[model], tp, tokens, dtype, device):
                for direction, who, seconds, rate in measure(problem, clock, runs, not args.no_compile):
                    times = [1e3 * t for t in seconds]
                    results.append(
                        Result(problem.op, direction, model, tp, tokens, who, *times, rate / 1e9, rate / copy)
                    )
                torch.compiler.reset()
    print(table(results, targets=not on_cpu))
    if args.json:
        facts = {"device": name, "dtype": str(dtype), "copy_gb_per_s": copy / 1e9, "choice": said}
        args.json.write_text(json.dumps(facts | {"results": [asdict(r) for r in results]}, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot, f"{name}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
