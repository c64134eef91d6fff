"""The cost of checkpoints for training: blocking saves, `async_save`, and torch's own asynchronous save.

    python benchmarks/saving.py [--folder DIR] [--json FILE] [--rounds 5]
    python benchmarks/saving.py --device cuda --hidden 2048 --layers 2 --vocab 16384 --seq 2048 --rounds 3

One process trains a random model with the real engine. In each round, every method saves the same state once, in turn.
Measured are the time until training continues (blocked), the slowdown of steps during the write relative to the median
step without one (slowed), and the time until the checkpoint is complete (written). Blocked plus slowed is lost.
torch's `distributed.checkpoint.async_save` saves the same tensors in its own format, without checksums or a sync to
disk. The two floors are one copy of the same number of bytes to host memory, and one plain file of that size with
fsync, in the same folder and run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.small_llama import SmallLlama, random_samples, start_engine, train_step  # noqa: E402
from megatron.checkpoint.background import BackgroundSaver  # noqa: E402
from megatron.checkpoint.save import save_checkpoint  # noqa: E402
from megatron.checkpoint.state import TrainState  # noqa: E402

Step = Callable[[], float]  # one training step; its seconds
ALONE, CHUNK = 8, 1 << 24


@dataclass
class Cost:
    """Seconds of each save with one method, in order of rounds."""

    blocked: list[float] = field(default_factory=list)
    slowed: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)

    def add(self, blocked: float, slowed: float, written: float) -> None:
        self.blocked.append(blocked)
        self.slowed.append(slowed)
        self.written.append(written)

    @property
    def lost(self) -> list[float]:
        return [a + b for a, b in zip(self.blocked, self.slowed, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = measure(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    engine, args, step = training(options, folder)
    state = TrainState()
    tensors = own_tensors(engine, args, state)
    total = sum(tensor.nbytes for tensor in tensors.values())
    ours = Ours(engine, args, state)
    prepared = timed(ours.saver.prepare)
    ways = {"sync": Sync(engine, args, state), "async_save": ours, "torch async": Torch(tensors, folder / "torch")}
    flat = torch.ones(total, dtype=torch.uint8, device=engine.place.device)
    host = torch.zeros(total, dtype=torch.uint8, pin_memory=engine.place.device.type == "cuda")
    costs = {name: Cost() for name in ways}
    floors: dict[str, list[float]] = {"copy": [], "disk": []}
    alone: list[float] = []
    for _ in range(3):
        step()  # to warm up
    for number in range(options.rounds + 1):
        steps = [step() for _ in range(ALONE)]
        for name, way in ways.items():  # round 0 warms up
            state.iteration += 1
            seconds = cost_of(way, step, statistics.median(steps))
            if number:
                costs[name].add(*seconds)
        if number:
            alone += steps
            floors["copy"].append(timed(lambda: host.copy_(flat)))
            floors["disk"].append(timed(lambda: write_plainly(folder / "plain", host)))
    return report_costs(options, costs, floors, alone, prepared, total / 1e9)


class Way:
    """A method of saving the state: `save` returns when training may continue, `over` says whether all is written."""

    def save(self) -> None:
        raise NotImplementedError

    def over(self) -> bool:
        return True


class Sync(Way):
    def __init__(self, engine: Any, args: Any, state: TrainState) -> None:
        self.engine, self.args, self.state = engine, args, state

    def save(self) -> None:
        save_checkpoint(self.engine, self.args, self.state, data_fingerprints={})


class Ours(Way):
    def __init__(self, engine: Any, args: Any, state: TrainState) -> None:
        self.saver, self.state = BackgroundSaver(engine, args, {}), state

    def save(self) -> None:
        self.saver.begin(self.state)

    def over(self) -> bool:
        self.saver.poll()
        if not self.saver.in_flight and self.saver.completed != self.state.iteration:
            raise SystemExit("a save failed; times would be meaningless")
        return not self.saver.in_flight


class Torch(Way):
    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        self.tensors, self.folder, self.future = tensors, folder, None

    def save(self) -> None:
        from torch.distributed.checkpoint import async_save

        self.future = async_save(self.tensors, checkpoint_id=str(self.folder))

    def over(self) -> bool:
        if self.future.done():
            self.future.result()
            shutil.rmtree(self.folder)
            return True
        return False


def cost_of(way: Way, step: Step, usual: float) -> tuple[float, float, float]:
    """(blocked, slowed, written) of a save, with training steps until it completes; `usual` is a step without one."""
    start = time.perf_counter()
    way.save()
    blocked = time.perf_counter() - start
    slowed = 0.0
    while not way.over():
        slowed += step() - usual
    return blocked, slowed, time.perf_counter() - start


def report_costs(
    options: argparse.Namespace,
    costs: dict[str, Cost],
    floors: dict[str, list[float]],
    alone: list[float],
    prepared: float,
    gigabytes: float,
) -> dict[str, Any]:
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(
        f"{options.layers} layers of {options.hidden}, vocabulary {options.vocab}: {gigabytes:.2f} GB a checkpoint, "
        f"{where}, torch {torch.__version__}; step {spread(alone)} s; {options.rounds} rounds, median (range)"
    )
    for name, cost in costs.items():
        print(
            f"{name:>12}: blocked {spread(cost.blocked)} s  slowed {spread(cost.slowed)} s  "
            f"lost {spread(cost.lost)} s  written after {spread(cost.written)} s"
        )
    for name, values in floors.items():
        print(f"{name + ' floor':>12}: {spread(values)} s ({gigabytes / statistics.median(values):.2f} GB/s)")
    sync, ours, theirs = (costs[name] for name in ("sync", "async_save", "torch async"))
    ratios = {
        "sync / async blocked": median_ratio(sync.blocked, ours.blocked),
        "sync / async lost": median_ratio(sync.lost, ours.lost),
        "async blocked / copy floor": median_ratio(ours.blocked, floors["copy"]),
        "sync blocked / disk floor": median_ratio(sync.blocked, floors["disk"]),
        "torch async / async blocked": median_ratio(theirs.blocked, ours.blocked),
        "torch async / async lost": median_ratio(theirs.lost, ours.lost),
    }
    print("ratios: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    print(f"buffers of async_save, made once at the start of a run: {prepared:.3f} s")
    report = {name: vars(cost) | {"lost": cost.lost} for name, cost in costs.items()}
    return {
        "ratios": ratios,
        "seconds": report,
        "floors": floors,
        "steps": alone,
        "prepared": prepared,
        "GB": gigabytes,
    }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(one) / statistics.median(other)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write_plainly(path: Path, data: Tensor) -> None:
    view = memoryview(data.numpy())
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(view), CHUNK):
            file.write(view[start : start + CHUNK])
        os.fsync(file.fileno())
    path.unlink()


def own_tensors(engine: Any, args: Any, state: TrainState) -> dict[str, Tensor]:
    """All tensors of a checkpoint, flat, for torch's own save."""
    from megatron.checkpoint.rank_files import rank_contents

    found: dict[str, Tensor] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value.detach()
        elif isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                visit(item, f"{name}/{key}")

    for name, file in rank_contents(engine, args, state).items():
        visit(file.content, name)
    return found


def training(options: argparse.Namespace, folder: Path) -> tuple[Any, Any, Step]:
    """A single-process engine of a random model, its arguments, and a function that runs a training step."""
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # torch's asynchronous save needs gloo as well
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
    model = SmallLlama(options.hidden, options.layers, options.vocab, options.seq)
    args = model.arguments(
        train_micro_batch_size_per_gpu=options.batch,
        distributed_backend="nccl" if cuda else "gloo",
        precision="bfloat16" if cuda else "fp32",
        save=str(folder / "checkpoints"),
        checkpoint_factor=1,
        keep_last_n_checkpoints=1,
        async_save=True,
    )
    engine = start_engine(args, torch.device("cuda", 0) if cuda else torch.device("cpu"))
    samples = random_samples(options.vocab, options.seq, options.batch)

    def step() -> float:
        start = time.perf_counter()
        train_step(engine, args, samples)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return engine, args, step


if __name__ == "__main__":
    sys.exit(main())
