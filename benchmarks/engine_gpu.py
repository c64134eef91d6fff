"""Measurements for deciding on `engine: megatron` on a machine with GPUs, on one or two nodes in ten minutes.

    srun --nodes 2 --ntasks-per-node 8 --gpus-per-task 1 python benchmarks/engine_gpu.py [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/engine_gpu.py --device cpu --small

Two pipeline stages, the first and the second half of the ranks, exchange messages of the 70B's size (16.8 MB both ways)
over the engine's directed links. Probes, each with 4 and with 8 hardware queues (GPU_MAX_HW_QUEUES) and with and
without a device bound to the process group (`device_id`):

    links           GB/s of every pair while all send and receive
    held up         delay of matrix products queued after a receive whose message is late; should be zero
    slowed down     slowdown of matrix products while messages are in flight
    communicator    device memory of a communicator of two ranks

Then training steps of layers of the 70B, tensor-parallel within a stage, under DeepSpeed and under megatron-core with
one and two virtual stages per rank, the latter also with 4 queues and without a bound device. Each case runs in its own
processes, because queues are created when a device is first used, and has a time limit: a case that hangs is reported
and the next one starts. Rank 0 prints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QUEUES = "GPU_MAX_HW_QUEUES"
RESULT = "RESULT "
LATE = 0.3  # delay of the message in "held up", in seconds


@dataclass(frozen=True)
class Case:
    """A case that runs in its own processes; `engine` "" means the probes."""

    queues: int = 8
    bound: bool = True
    engine: str = ""
    virtual: int = 1

    @property
    def name(self) -> str:
        what = "probes"
        if self.engine:
            what = self.engine + (f", {self.virtual} virtual stages" if self.virtual > 1 else "")
        return f"{what}; {self.queues} queues, device {'bound' if self.bound else 'not bound'}"


PROBES = [Case(queues, bound) for queues in (8, 4) for bound in (True, False)]
STEPS = [
    Case(engine="deepspeed"),
    Case(engine="megatron"),
    Case(engine="megatron", virtual=2),
    Case(4, True, "megatron", 2),
    Case(8, False, "megatron", 2),
]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model for the steps, and of the matrix products that overlap messages: [n, n] x [n, n]."""

    hidden: int
    layers: int
    seq: int
    vocab: int
    product: int
    message: int  # bytes
    timed_steps: int


LARGE = Sizes(8192, 8, 8192, 32_000, 8192, 16_777_216, 5)
SMALL = Sizes(256, 4, 32, 128, 64, 65_536, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny model and messages, to test the script itself")
    parser.add_argument("--limit", type=float, default=100.0, help="time limit per case, in seconds")
    parser.add_argument("--json", type=Path, help="also write the figures there, on rank 0")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a process of one case
    options = parser.parse_args()
    from megatron.parallel.rank_env import find_started_rank, set_rendezvous

    started = find_started_rank(os.environ)
    if started is None or started.world_size % 2:
        print("engine_gpu: start it on an even number of ranks, by srun or torchrun", file=sys.stderr)
        return 2
    if options.case:
        return _run_case(Case(**json.loads(options.case)), options)
    set_rendezvous(os.environ)
    found: dict[str, Any] = {}
    for number, case in enumerate([*PROBES, *STEPS]):
        found[case.name] = _start_case(case, number, options)
        if started.rank == 0:
            print(f"{case.name}: {_said(found[case.name])}", flush=True)
    if started.rank == 0:
        print("\n".join(["", *verdict(found)]))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


# --- the processes of a case


def _start_case(case: Case, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in a separate process; returns its figures on rank 0, or the reason for its failure."""
    port = 1024 + (int(os.environ["MASTER_PORT"]) - 1024 + 1 + number) % 60_000
    environment = os.environ | {QUEUES: str(case.queues), "MASTER_PORT": str(port)}
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's own store serves one world
    command = [sys.executable, __file__, "--device", options.device, "--case", json.dumps(asdict(case))]
    command += ["--small"] * options.small
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=options.limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": f"not done within {options.limit:.0f} s"}
    lines = [line for line in output.splitlines() if line.startswith(RESULT)]
    if process.returncode == 0:
        return json.loads(lines[-1].removeprefix(RESULT)) if lines else {}
    last = [line for line in errors.splitlines() if line.strip()][-1:] or ["no message"]
    return {"failed": f"exit code {process.returncode}: {last[0]}"}


def _run_case(case: Case, options: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from megatron.parallel.gpu_placement import device_index
    from megatron.parallel.rank_env import find_started_rank

    started = find_started_rank(os.environ)
    assert started is not None
    os.environ.update(RANK=str(started.rank), LOCAL_RANK=str(started.local_rank), WORLD_SIZE=str(started.world_size))
    device = torch.device("cpu")
    if options.device == "cuda":
        count = torch.cuda.device_count()
        index = device_index(started.local_rank, started.local_world_size, count, os.environ)
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if options.device == "cuda" else "gloo",
        init_method=f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        rank=started.rank,
        world_size=started.world_size,
        timeout=timedelta(seconds=90),
        device_id=device if case.bound and options.device == "cuda" else None,
    )
    sizes = SMALL if options.small else LARGE
    own = _steps(case, sizes, device) if case.engine else _probe(sizes, device)
    by_rank: list[Any] = [None] * started.world_size
    dist.all_gather_object(by_rank, own)
    if started.rank == 0:
        print(RESULT + json.dumps(_together(by_rank)), flush=True)
    dist.destroy_process_group()
    return 0


def _together(by_rank: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Median over ranks; for links also the slowest."""
    found: dict[str, float | None] = {}
    for name in by_rank[0]:
        values = [value for rank in by_rank if (value := rank[name]) is not None]
        found[name] = statistics.median(values) if values else None
        if name == "links" and values:
            found["slowest_link"] = min(values)
    return found


# --- probes


def _probe(sizes: Sizes, device: Any) -> dict[str, float | None]:
    """One rank's figures: GB/s, shares, MiB."""
    import torch
    import torch.distributed as dist

    from megatron.engine.mcore_groups import EngineGroups
    from megatron.parallel.process_groups import form_groups
    from megatron.preflight.measurements import synchronize
    from megatron.preflight.stage_links import pair_communicator_bytes, stage_link_rate

    # Rank r of the first stage is linked to rank r + half of the second.
    rank, world = dist.get_rank(), dist.get_world_size()
    half = world // 2
    args = _arguments(Case(engine="megatron"), sizes, device, world)
    links = EngineGroups.make(form_groups(args, device), False, False, 2).links
    pair = (rank, rank + half) if rank < half else (rank - half, rank)
    rate = stage_link_rate(pair, rank, sizes.message, device, links)

    a = torch.randn(sizes.product, sizes.product, device=device).to(
        torch.bfloat16 if device.type == "cuda" else torch.float32
    )

    def products() -> None:
        for _ in range(16):
            torch.mm(a, a)

    def timed(before: Callable[[], Any]) -> float:
        """Seconds of the matrix products queued after the operations of `before`."""
        dist.barrier()
        synchronize(device)
        work = before()
        started = time.perf_counter()
        products()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        seconds = time.perf_counter() - started
        for one in work or ():
            one.wait()
        synchronize(device)
        return seconds

    message, arriving = (torch.zeros(sizes.message // 4, device=device) for _ in range(2))

    def late() -> list[Any]:
        """The second stage waits for a message; the first sends it after LATE seconds."""
        if rank >= half:
            link = links.hidden_in
            return [dist.irecv(arriving, link.peer, group=link.group)] if link else []
        time.sleep(LATE)
        link = links.hidden_out
        return [dist.isend(message, link.peer, group=link.group)] if link else []

    def travelling() -> list[Any]:
        """Post eight messages in each direction."""
        out, into = (links.hidden_out, links.gradient_in) if rank < half else (links.gradient_out, links.hidden_in)
        assert out is not None
        assert into is not None
        posted: list[Any] = []
        for _ in range(8):
            posted += [dist.irecv(arriving, into.peer, group=into.group)]
            posted += [dist.isend(message, out.peer, group=out.group)]
        return posted

    timed(lambda: None)  # to warm up
    alone = min(timed(lambda: None) for _ in range(3))
    behind = timed(late)
    beside = min(timed(travelling) for _ in range(3))
    taken = pair_communicator_bytes(rank, world, sizes.message, device) if _can_split(device) else None
    return {
        "links": rate / 1e9,
        "held_up": max(0.0, behind - alone) if rank >= half else None,
        "slowed_down": beside / alone - 1,
        "communicator_mib": None if taken is None else taken / 2**20,
    }


def _can_split(device: Any) -> bool:
    """`split_group` needs a bound device."""
    import torch.distributed as dist

    world = dist.group.WORLD
    return device.type == "cuda" and world is not None and world.bound_device_id is not None


# --- steps


def _arguments(case: Case, sizes: Sizes, device: Any, world: int) -> Any:
    """Two stages; within each, the highest TP that the heads and a node of eight allow."""
    from benchmarks.small_llama import SmallLlama

    model = SmallLlama(sizes.hidden, sizes.layers, sizes.vocab, sizes.seq)
    tensor = max(size for size in (1, 2, 4, 8) if (world // 2) % size == 0 and model.kv_heads % size == 0)
    return model.arguments(
        world,
        engine=case.engine,
        virtual_pipe_parallel_size=case.virtual,
        pipe_parallel_size=2,
        model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        num_gpus=world,
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=8,
        precision="bfloat16" if device.type == "cuda" else "fp32",
        distributed_backend="nccl" if device.type == "cuda" else "gloo",
    )


def _steps(case: Case, sizes: Sizes, device: Any) -> dict[str, float | None]:
    """Seconds per step, after two untimed steps: megatron-core's first step does not overlap communication."""
    import torch.distributed as dist

    from benchmarks.small_llama import random_samples, start_engine, train_step
    from megatron.preflight.measurements import synchronize

    args = _arguments(case, sizes, device, dist.get_world_size())
    engine = start_engine(args, device)
    samples = random_samples(sizes.vocab, sizes.seq, args.train_batch_size)
    seconds, loss = [], 0.0
    for number in range(2 + sizes.timed_steps):
        dist.barrier()
        synchronize(device)
        started = time.perf_counter()
        loss = train_step(engine, args, samples)
        synchronize(device)
        if number >= 2:
            seconds.append(time.perf_counter() - started)
    return {"step_seconds": statistics.median(seconds), "loss": loss}


# --- output


def _said(figures: Mapping[str, Any]) -> str:
    if "failed" in figures:
        return f"FAILED, {figures['failed']}"
    if "step_seconds" in figures:
        return f"{figures['step_seconds']:.4g} s a step, loss {figures['loss']:.4f}"
    memory = figures.get("communicator_mib")
    return (
        f"links {figures['links']:.3g} GB/s each way (slowest {figures['slowest_link']:.3g}), products held up "
        f"{figures['held_up']:.3g} s of {LATE} by a late message, slowed down {figures['slowed_down']:.1%} by "
        f"messages, a communicator {'not measured' if memory is None else f'{memory:.0f} MiB'}"
    )


def verdict(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Conclusions for a configuration, one line per question."""
    ok = {name: figures for name, figures in found.items() if figures and "failed" not in figures}
    lines = []
    probes = {case: ok.get(case.name) for case in PROBES}
    held = [case.name for case, figures in probes.items() if figures and figures["held_up"] > LATE / 2]
    if held:
        lines.append("a late message holds up computation with: " + "; ".join(held))
    elif any(probes.values()):
        lines.append("a late message holds up computation in no case")
    base, two = ok.get(STEPS[0].name), ok.get(STEPS[2].name)
    if base and two:
        ratio = base["step_seconds"] / two["step_seconds"]
        lines.append(f"two virtual stages: {ratio:.2f} times as fast as DeepSpeed on the same ranks")
        if abs(base["loss"] - two["loss"]) > 0.01 * abs(base["loss"]):
            lines.append("BUT the two do not train alike: their losses differ by more than 1 %; do not use it")
    for other, what in ((STEPS[3], f"{QUEUES}=4 in the place of 8"), (STEPS[4], "no device bound in the place of one")):
        if two and other.name in ok:
            lines.append(f"{what}: {ok[other.name]['step_seconds'] / two['step_seconds']:.2f} times the step")
    failed = [name for name, figures in found.items() if "failed" in figures]
    lines.append(f"failed: {'; '.join(failed)}" if failed else "no case failed")
    return lines


if __name__ == "__main__":
    sys.exit(main())
