"""The cost of monitoring per step: everything at its defaults compared with everything off, on the tiny model.

    python benchmarks/watching.py [--ranks 8] [--rounds 12] [--steps 10]

One run of gloo ranks (TP2 x PP2, the rest data parallel) alternates blocks of steps. Off is DeepSpeed's plain engine
and the one-number all-reduce for signals that every run has; on is the engine with phases, the exchange between steps,
the monitor of step times, and the heartbeat. The comparison of replicas is timed separately and included once per
`replica_check_interval` steps. Printed are the medians over blocks with their range, wall time and CPU time of rank 0
(less disturbed by other load), and the ratios (above 1: monitoring costs time).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ranks import run_ranks_forked  # noqa: E402
from benchmarks.small_llama import random_samples, train_step  # noqa: E402


class Around:
    """A context around the phases of a step, which can be replaced while the engine exists."""

    def __init__(self) -> None:
        self.inner: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def __call__(self, phase: str) -> AbstractContextManager[Any]:
        return self.inner(phase)


def measure(rank: int, world_size: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each block, for `off` and `on`, and seconds per comparison of replicas."""
    import torch
    import torch.distributed as dist

    from megatron.engine.build import build_engine
    from megatron.neox_arguments import NeoXArgs
    from megatron.parallel.process_groups import form_groups
    from megatron.supervision.step_monitor import StepMonitor
    from megatron.supervision.step_timers import StepTimers
    from megatron.supervision.watchdog import Watchdog

    files = [ROOT / "configs/tiny" / name for name in ("model.yml", "run.yml", "local.yml")]
    overrides = {
        "num_gpus": world_size,
        "load": None,
        "finetune": False,
        "from_scratch": True,
        "save": None,
        "log_dir": None,
        "tensorboard_dir": None,
        "precision": "fp32",
        "train_data_paths": ["unused"],
        "train_data_weights": None,
        "valid_data_paths": None,
    }
    args = NeoXArgs.from_ymls(files, overrides, world_size)
    place = form_groups(args)
    around = Around()
    engine = build_engine(args, place, around)
    engine.initialize_weights()
    samples = random_samples(args.vocab_size, args.seq_length, args.train_batch_size)
    seconds: dict[str, list[float]] = {"off": [], "on": [], "off CPU": [], "on CPU": [], "replicas": []}
    flag = torch.zeros((), dtype=torch.int32)
    for _ in range(rounds):
        # Off: after one step to warm up, only the all-reduce for signals.
        around.inner = nullcontext
        train_step(engine, args, samples)
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            train_step(engine, args, samples)
        seconds["off"].append((time.perf_counter() - start) / steps)
        seconds["off CPU"].append((time.process_time() - cpu) / steps)

        # On: everything at its defaults, then one comparison of replicas.
        with Watchdog(args, place) as watchdog:
            timers = StepTimers(watchdog.whereabouts, place.device)
            around.inner = timers.during
            monitor = StepMonitor(engine, args, timers)
            train_step(engine, args, samples)
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            for iteration in range(steps):
                monitor.between_steps(0, iteration)
                with monitor.profiler.step(iteration + 1), timers.step(iteration + 1, first=False):
                    train_step(engine, args, samples)
                monitor.after_step(iteration + 1, saving=False)
            seconds["on"].append((time.perf_counter() - start) / steps)
            seconds["on CPU"].append((time.process_time() - cpu) / steps)
            start = time.perf_counter()
            monitor.check_replicas(0)
            seconds["replicas"].append(time.perf_counter() - start)
    return seconds | {"interval": [float(args.replica_check_interval)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    import megatron.engine.deepspeed  # noqa: F401  # once, before the ranks fork

    seconds: dict[str, Any] = run_ranks_forked(measure, options.ranks, options.rounds, options.steps)[0]
    interval = seconds.pop("interval")[0]
    for name, values in seconds.items():
        low, high = min(values) * 1e3, max(values) * 1e3
        print(f"{name:>8}: {statistics.median(values) * 1e3:.2f} ms ({low:.2f} to {high:.2f})")
    replicas = statistics.median(seconds["replicas"])
    for kind in ("", " CPU"):
        off, on = (statistics.median(seconds[name + kind]) for name in ("off", "on"))
        print(f"ratio on / off{kind}: {(on + replicas / interval) / off:.4f}, with replicas in 1 of {interval:g} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
