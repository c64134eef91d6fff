"""Setup of a rank: its device and process groups, and checks of the placement of all ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.parallel.collective_errors import gather_by_rank
from megatron.parallel.gpu_placement import (
    Seat,
    check_devices,
    check_tensor_groups,
    coordinates,
    device_index,
    seat_summary,
    seat_table,
)
from megatron.parallel.loopback import on_one_node, rendezvous_on_loopback, talk_over_loopback
from megatron.parallel.place import Place
from megatron.parallel.rank_env import StartedRank, find_started_rank, node_name, set_rendezvous

# AMD's libraries and torch's names for them: torch built for ROCm uses the names of the NVIDIA counterparts.
GEMM_LIBRARIES = {"hipBLASLt": "cublaslt", "rocBLAS": "cublas"}

ROWS_SHOWN = 64  # ranks; the table of a larger run is only written to a file


@dataclass(frozen=True)
class ModelGroups:
    """This rank's tensor-parallel, data-parallel and pipeline groups.

    `tied` joins the two stages that hold a tied embedding; None if there is only one copy, or none on this rank.
    """

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipe: dist.ProcessGroup
    tied: dist.ProcessGroup | None = None


def initialize(args: NeoXArgs) -> Place:
    """Initialize this rank's device, the default process group and megatron-core's groups; returns its place.

    Reads the rank from the environment (`rank_env`), and MASTER_ADDR and MASTER_PORT unless the launcher provides its
    own rendezvous. Raises ConfigError if the ranks have different configurations, their number is not the configured
    one, a tensor-parallel group spans nodes or two ranks share a GPU; RuntimeError if megatron-core numbers ranks
    differently.
    """
    started = started_ranks(args)
    rank, world_size, local_rank = started.rank, started.world_size, started.local_rank
    # DeepSpeed's pipeline reads LOCAL_RANK, which Slurm does not set.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    device = take_device(args, started)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    where: dict[str, Any] = {"init_method": os.environ.get("NEOX_RENDEZVOUS", "env://")}
    if "NEOX_RENDEZVOUS" not in os.environ:
        set_rendezvous(os.environ)
        if on_one_node(started, os.environ):
            talk_over_loopback()
            where = {"store": rendezvous_on_loopback(started, os.environ, timeout)}
    dist.init_process_group(
        args.distributed_backend,
        **where,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    check_same_configuration(args, device)
    report_seats(args, started, device)
    return form_groups(args, device, local_rank)


def form_groups(args: NeoXArgs, device: torch.device | None = None, local_rank: int | None = None) -> Place:
    """Create megatron-core's groups within an initialized world; returns this rank's place, by default on the CPU.

    RuntimeError if megatron-core assigns a rank other coordinates than `Place`.
    """
    rank = dist.get_rank()
    place = Place.of(args, rank, rank if local_rank is None else local_rank, device or torch.device("cpu"))
    if args.engine == "megatron":  # this engine creates its own groups
        return place
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.model_parallel_size,
        pipeline_model_parallel_size=args.pipe_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        order="tp-cp-ep-dp-pp",  # innermost first: pipe, data, model order of GPT-NeoX and DeepSpeed
        create_gloo_process_groups=False,
    )
    ours = (place.pp_rank, place.dp_rank, place.tp_rank)
    theirs = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if ours != theirs:
        raise RuntimeError(f"rank {rank} is (pipe, data, tensor) {ours} here and {theirs} for megatron-core")
    return place


def set_timeouts(minutes: int) -> None:
    """Set the timeout of every process group of this rank, including those that libraries created.

    DeepSpeed creates its pipeline and data-parallel groups without a timeout, and torch then sets 10 minutes for NCCL,
    whatever the default group's timeout is.
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def started_ranks(args: NeoXArgs) -> StartedRank:
    """How this process was started. ConfigError if it was not started as a rank, or the number of ranks is wrong."""
    started = find_started_rank(os.environ)
    if started is None:
        raise ConfigError(
            "this process was not started as a rank (neither RANK, WORLD_SIZE and LOCAL_RANK nor Slurm's variables are "
            "set); start it by python deepy.py, srun or torchrun"
        )
    if started.world_size != args.global_num_gpus:
        raise ConfigError(
            f"{started.world_size} ranks were started, the configuration is made for {args.global_num_gpus}"
        )
    return started


def take_device(args: NeoXArgs, started: StartedRank) -> torch.device:
    """Set and return this rank's device: the CPU, the only visible GPU, or the GPU with the local rank's number."""
    if args.device == "cpu":
        return torch.device("cpu")
    index = device_index(started.local_rank, started.local_world_size, torch.cuda.device_count(), os.environ)
    torch.cuda.set_device(index)
    choose_gemm_library(args)
    return torch.device("cuda", index)


def choose_gemm_library(args: NeoXArgs) -> None:
    """Have torch use the configured library for matrix products. Raises ConfigError if torch is not built for ROCm."""
    if args.gemm_library == "default":
        return
    if torch.version.hip is None:
        raise ConfigError(
            f"gemm_library: {args.gemm_library}, but this PyTorch is not built for ROCm; leave gemm_library out"
        )
    names = {library.lower(): name for library, name in GEMM_LIBRARIES.items()}
    torch.backends.cuda.preferred_blas_library(names[args.gemm_library])


def report_seats(args: NeoXArgs, started: StartedRank, device: torch.device) -> None:
    """Gather the placement of all ranks, check it on all of them, and print it on rank 0. Collective."""
    seats = gather_by_rank(find_seat(args, started, device))
    check_seats([seat for seat, _ in seats])
    if started.rank == 0:
        print_seats(args, seats)


def find_seat(args: NeoXArgs, started: StartedRank, device: torch.device) -> tuple[Seat, int | None]:
    """This rank's seat, and the NUMA domain of its GPU; None if the kernel does not report it."""
    sizes = (args.pipe_parallel_size, args.data_parallel_size, args.model_parallel_size)
    identity, numa = (None, None) if device.type == "cpu" else _gpu(device.index)
    where = coordinates(started.rank, *sizes)
    return Seat(started.rank, node_name(os.environ), started.local_rank, *where, identity), numa


def check_seats(seats: Sequence[Seat]) -> None:
    """Raise ConfigError if a tensor-parallel group spans nodes, or two ranks have taken the same GPU."""
    check_tensor_groups(seats)
    check_devices(seats)


def print_seats(args: NeoXArgs, told: Sequence[tuple[Seat, int | None]]) -> None:
    """Print the placement of all ranks, unless they run on this machine's CPU; a large table goes to
    `log_dir/ranks.txt`."""
    seats = [seat for seat, _ in told]
    if args.device == "cpu" and len({seat.node for seat in seats}) == 1:
        return
    print(seat_summary(seats), flush=True)
    rows = seat_table(seats, {seat.rank: domain for seat, domain in told})
    if len(seats) <= ROWS_SHOWN or not args.log_dir:
        print("\n".join(rows), flush=True)
        return
    path = Path(args.log_dir) / "ranks.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    print(f"ranks: all of them are in {path}", flush=True)


def _gpu(index: int) -> tuple[str, int | None]:
    """A GPU's PCI address, which identifies it on its node, and its NUMA domain; None if the kernel has none."""
    properties: Any = torch.cuda.get_device_properties(index)  # torch's stubs lack the PCI numbers
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    try:
        numa = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text())
    except (OSError, ValueError):
        return address, None
    return address, numa if numa >= 0 else None


def check_same_configuration(args: NeoXArgs, device: torch.device) -> None:
    """Raise ConfigError on all ranks if any two have different configurations. Collective."""
    mark = int(args.digest[:15], 16)
    extremes = torch.tensor([mark, -mark], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise ConfigError("the ranks hold different configurations; give all of them the same files and overrides")
