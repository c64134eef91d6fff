"""Training-step time of both engines against `transformers`, eager and compiled: same weights, same batch, one process.

    python benchmarks/step_time.py [--json FILE] [--hidden 512 ...]
    python benchmarks/step_time.py --device cuda --hidden 2048 --layers 16 --vocab 128256 --seq 4096 --batch 1
    python benchmarks/step_time.py --documents 1 4 32 [--device cuda ...]

Each round runs all implementations in turn: forward, loss, backward, clipping and AdamW. On the CPU in fp32; on a GPU,
ours in bf16 with fp32 masters and fp32 gradients, transformers with fp32 weights under bf16 autocast, as in its Trainer
and with the same master precision; `compiled` is its model under `torch.compile`. The report has the median and range
of each, and the ratios of the medians (above 1: ours is faster). Ours includes the engines (`engine: deepspeed` and
`engine: megatron`), as in a run. On the CPU, `deepy.py` then starts the tiny model on eight processes (TP2 x PP2 x
DP2), and the run reports how the time from the command line to the end of its first step was spent.

With `--documents`, one of our engines runs alone, on samples of the given numbers of equally long isolated documents,
and on samples whose documents are not isolated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANK_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.small_llama import HEAD_DIM, SmallLlama, start_engine, train_step  # noqa: E402
from megatron.neox_arguments import NeoXArgs  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kernels", default="auto", help="our fused operations: auto, reference or required")
    parser.add_argument("--engines", nargs="+", choices=("deepspeed", "megatron"), default=["deepspeed", "megatron"])
    parser.add_argument("--no-compile", action="store_true", help="skip transformers under torch.compile")
    parser.add_argument("--documents", type=int, nargs="+", help="isolated documents in a sample, instead of the peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-startup", action="store_true", help="skip the start of deepy.py")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = SmallLlama(options.hidden, options.layers, options.vocab, options.seq)
    device = torch.device(options.device)
    if options.documents:
        return documents(case, options, device)
    peers = {"transformers": transformers_step(case, options.batch, device)}
    if not options.no_compile:
        peers["compiled"] = transformers_step(case, options.batch, device, compiled=True)
    start_world(device)
    ours = {engine: neox_step(case, options.batch, device, options.kernels, engine) for engine in options.engines}
    steps = peers | ours
    times, cpu, losses = in_turn(steps, options.rounds)
    difference = max(max(row) / min(row) - 1 for row in zip(*losses.values(), strict=True))
    if difference > (1e-3 if device.type == "cpu" else 1e-2):  # bf16 rounds differently in each
        raise SystemExit(f"their losses differ (relative difference {difference:.1e}); times would be meaningless")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{case.layers} layers, hidden {case.hidden}, {case.heads}/{case.kv_heads} heads, vocabulary {case.vocab}, "
        f"batch {options.batch} x {case.seq}, {where(device, options)}; largest relative loss difference "
        f"{difference:.1e}"
    )
    print_times(times, cpu, options.batch * case.seq)
    ratios = {f"{peer} / {engine}": medians[peer] / medians[engine] for engine in ours for peer in peers}
    cpu_medians = {name: statistics.median(values) for name, values in cpu.items()}
    for engine in ours:
        for peer in peers:
            print(
                f"ratio {peer} / {engine}: {ratios[f'{peer} / {engine}']:.3f} by the clock, "
                f"{cpu_medians[peer] / cpu_medians[engine]:.3f} in CPU time"
            )
    startup = None if options.no_startup or device.type != "cpu" else first_step_line()
    if startup:
        print(f"deepy.py, 8 processes on {os.cpu_count()} cores: {startup}")
    if options.json:
        report = {"ratios": ratios, "seconds": times, "cpu_seconds": cpu, "startup": startup}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def in_turn(steps: dict[str, Any], rounds: int) -> tuple[dict[str, list[float]], ...]:
    """(wall times, CPU times, losses) of each step by name, in seconds: times of `rounds` rounds after two to warm up,
    losses of all rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 2):
        for name in sorted(steps, reverse=bool(round_number % 2)):
            start, cpu_start = time.perf_counter(), time.process_time()
            losses[name].append(steps[name](round_number))
            if round_number >= 2:
                times[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    return times, cpu, losses


def print_times(times: dict[str, list[float]], cpu: dict[str, list[float]], tokens: int) -> None:
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:>12}: median {median * 1e3:8.1f} ms  range {min(values) * 1e3:.1f} to {max(values) * 1e3:.1f} ms  "
            f"{tokens / median:,.0f} tokens/s  CPU {statistics.median(cpu[name]) * 1e3:.1f} ms"
        )


def documents(case: SmallLlama, options: argparse.Namespace, device: torch.device) -> int:
    """Steps of one engine on samples of isolated documents, against those of samples that are one document."""
    from megatron.model.attention import document_attention_on

    start_world(device)
    args = arguments(case, options.batch, device, options.kernels, options.engines[0])
    engine = start_engine(args, device)

    def step(count: int | None) -> Any:
        lengths = [
            case.seq * (part + 1) // (count or 1) - case.seq * part // (count or 1) for part in range(count or 1)
        ]
        positions = torch.cat([torch.arange(length) for length in lengths])
        beside = {} if count is None else {"positions": positions}

        def run(number: int) -> float:
            tokens = batch(case, options.batch, number)
            samples = [{"tokens": row[:-1], "labels": row[1:].clone(), **beside} for row in tokens]
            return train_step(engine, args, samples)

        return run

    steps = {"not isolated": step(None)} | {f"{count} in each": step(count) for count in options.documents}
    times, cpu, _ = in_turn(steps, options.rounds)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    print(f"isolated documents: {document_attention_on(device.type, dtype, case.heads, case.kv_heads, HEAD_DIM).how}")
    print(
        f"{case.layers} layers, hidden {case.hidden}, {case.heads}/{case.kv_heads} heads, vocabulary {case.vocab}, "
        f"batch {options.batch} x {case.seq}, {where(device, options)}"
    )
    print_times(times, cpu, options.batch * case.seq)
    first = f"{options.documents[0]} in each"
    ratios = {
        name: [statistics.median(values[name]) / statistics.median(values[first]) for values in (times, cpu)]
        for name in times
        if name != first
    }
    for name, (clock, processor) in ratios.items():
        print(f"ratio {name} / {first}: {clock:.3f} by the clock, {processor:.3f} in CPU time")
    if options.json:
        report = {"ratios": ratios, "seconds": times, "cpu_seconds": cpu}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def where(device: torch.device, options: argparse.Namespace) -> str:
    if device.type == "cpu":
        return f"fp32, {options.threads} threads"
    from megatron import ops

    chosen = ops.configure(options.kernels, device)
    return f"bf16, {torch.cuda.get_device_name()}, torch {torch.__version__}, {chosen}"


def first_step_line() -> str:
    """The line on start-up time from a run of the tiny model."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    with tempfile.TemporaryDirectory() as folder:
        builder = IndexedDatasetBuilder(f"{folder}/tokens.bin", dtype=DType.optimal_dtype(4096))
        builder.add_document(torch.randint(4096, (20_000,)).int(), [20_000])
        builder.finalize(f"{folder}/tokens.idx")
        paths = ["--train_data_paths", f"[{folder}/tokens]", "--vocab_file", "null", "--valid_data_paths", "null"]
        paths += ["--train_data_weights", "null"]
        logs = ["--log_dir", "null", "--tensorboard_dir", "null", "--save", "null"]
        start = ["--load", "null", "--finetune", "false", "--from_scratch", "true", "--train_iters", "1"]
        configs = [f"configs/tiny/{name}.yml" for name in ("model", "run", "local")]
        command = [sys.executable, "deepy.py", "train.py", *configs, *paths, *logs, *start]
        alone = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        result = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if "to the end of the first step" in line]
    if not lines:
        raise SystemExit(f"deepy.py did not make a step (exit code {result.returncode}):\n{result.stderr[-2000:]}")
    return lines[0]


def batch(case: SmallLlama, size: int, number: int) -> torch.Tensor:
    return torch.randint(case.vocab, (size, case.seq + 1), generator=torch.Generator().manual_seed(number))


def transformers_step(case: SmallLlama, size: int, device: torch.device, compiled: bool = False) -> Any:
    """One step as in the Hugging Face Trainer, without its bookkeeping."""
    model = case.transformers_model().to(device).train()
    forward = torch.compile(model) if compiled else model
    decays = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=True,
    )

    def step(number: int) -> float:
        tokens = batch(case, size, number).to(device)
        # Labels equal the inputs: transformers shifts them itself, so the last position has no target.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def start_world(device: torch.device) -> None:
    """This process as the only rank."""
    os.environ.update(RANK_VARIABLES)
    store = tempfile.mkdtemp() + "/store"
    backend = "gloo" if device.type == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)


def arguments(case: SmallLlama, size: int, device: torch.device, kernels: str, engine: str) -> NeoXArgs:
    return case.arguments(
        engine=engine,
        train_micro_batch_size_per_gpu=size,
        distributed_backend="gloo" if device.type == "cpu" else "nccl",
        precision="fp32" if device.type == "cpu" else "bfloat16",
        kernels=kernels,
    )


def neox_step(case: SmallLlama, size: int, device: torch.device, kernels: str, engine_name: str) -> Any:
    """One step of a real engine."""
    args = arguments(case, size, device, kernels, engine_name)
    engine = start_engine(args, device, weights=dict(case.transformers_model().state_dict()))

    def step(number: int) -> float:
        tokens = batch(case, size, number)
        labels = tokens[:, 1:].clone()
        labels[:, -1] = -100  # not a target in transformers either
        samples = [{"tokens": ids, "labels": targets} for ids, targets in zip(tokens[:, :-1], labels, strict=True)]
        return train_step(engine, args, samples)

    return step


if __name__ == "__main__":
    sys.exit(main())
