"""Idle time of pipeline ranks under engine: megatron, simulated from the engine's real order and measured.

python benchmarks/engine_idle.py                   both tables
python benchmarks/engine_idle.py --write docs/engines.md

The simulation replays the recorded order (`benchmarks.engine_order`) with passes of equal length. The measurement runs
the engine on four gloo ranks that sleep instead of computing: waiting times are real, computation is not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.ranks import run_ranks_forked  # noqa: E402

BEGIN, END = "<!-- idle:begin -->", "<!-- idle:end -->"
GRID = list(product((4, 8), (1, 2, 5, 10), (16, 32)))
MESSAGE = 0.01  # of a stage's forward pass: 16.8 MB at 12.5 GB/s beside 150 ms
MEASURED = [(4, 1, 8), (4, 2, 8), (4, 2, 16), (4, 5, 8)]
FORWARD = 1.0  # seconds of a stage, which its virtual stages share; a backward pass takes twice that
ROUNDS = 3


def simulated() -> list[str]:
    """Idle fraction of the ranks' time for each p, v and m, next to (p - 1) / (v m + p - 1)."""
    from benchmarks.engine_order import play, record

    lines = ["| p | v | m | idle, simulated | from (p - 1) / (v m) |", "|---|---|---|---|---|"]
    for p, v, m in GRID:
        found = play(record(p, v, m), 1 / v, 2 / v, MESSAGE)
        bubble = (p - 1) / (v * m)
        lines.append(f"| {p} | {v} | {m} | {found.idle:.1%} | {bubble / (1 + bubble):.1%} |")
    return lines


def measure(rank: int, world_size: int, virtual: int, num_micro_batches: int) -> list[float]:
    """(seconds of the step, seconds of this rank's passes) for several consecutive steps."""
    import torch
    import torch.distributed as dist

    from benchmarks.engine_order import passes, run, small_arguments
    from megatron.engine.mcore import MegatronEngine
    from megatron.parallel.process_groups import form_groups

    args = small_arguments(world_size, virtual, num_micro_batches)
    engine = MegatronEngine.for_training(args, form_groups(args, torch.device("cpu")))
    slept = [0.0]

    def sleep(kind: str, chunk: int, micro_batch: int) -> None:
        start = time.perf_counter()
        time.sleep((1 if kind == "forward" else 2) * FORWARD / virtual)
        slept[0] += time.perf_counter() - start

    found = []
    with passes(engine, sleep):
        for _ in range(ROUNDS):
            slept[0] = 0.0
            dist.barrier()
            start = time.perf_counter()
            run(engine, num_micro_batches)
            dist.barrier()
            found += [time.perf_counter() - start, slept[0]]
    return found


def measured() -> Iterator[str]:
    """Rows of a table: the idle fraction measured on real ranks, next to the simulated one."""
    from benchmarks.engine_order import play, record

    yield "| p | v | m | idle, measured (median and range) | simulated | difference |"
    yield "|---|---|---|---|---|---|"
    for p, v, m in MEASURED:
        ranks = run_ranks_forked(measure, p, v, m)
        seconds = [max(steps) for steps in zip(*(rank[::2] for rank in ranks), strict=True)]
        slept = [sum(steps) for steps in zip(*(rank[1::2] for rank in ranks), strict=True)]
        shares = sorted(1 - work / (p * whole) for work, whole in zip(slept, seconds, strict=True))
        middle, expected = statistics.median(shares), play(record(p, v, m), 1 / v, 2 / v).idle
        yield (
            f"| {p} | {v} | {m} | {middle:.1%} ({shares[0]:.1%} to {shares[-1]:.1%}) | {expected:.1%} | "
            f"{100 * (middle - expected):+.1f} points |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a document whose tables between the markers are replaced")
    options = parser.parse_args()
    import megatron.engine.mcore  # noqa: F401  # once, before the ranks fork

    lines = [
        *simulated(),
        "",
        f"Four gloo ranks that sleep {FORWARD:g} s for a stage's forward pass and twice that for its backward "
        f"pass, {ROUNDS} steps:",
        "",
        *measured(),
    ]
    print("\n".join(lines))
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
