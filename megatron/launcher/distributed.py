"""From a process with RANK and WORLD_SIZE to a rank with its groups and device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state

from megatron.neox_arguments import ConfigError, NeoXArgs


@dataclass(frozen=True)
class Place:
    """Where this process stands: global and node-local rank, its coordinates, and its device."""

    rank: int
    world_size: int
    local_rank: int
    pipe: int
    data: int
    tensor: int
    device: torch.device


def initialize(args: NeoXArgs) -> Place:
    """Process group, device, megatron-core's groups and DeepSpeed's communication, for a rank that was started.

    Reads RANK, WORLD_SIZE and LOCAL_RANK, and MASTER_ADDR and MASTER_PORT unless the launcher gave a rendezvous of its
    own. Raises ConfigError if the ranks do not hold the same configuration or are not as many as it says, and
    RuntimeError if DeepSpeed and megatron-core disagree on who is who.
    """
    rank, world_size, local_rank = _environment(args)
    device = _device(args, local_rank)
    dist.init_process_group(
        args.distributed_backend,
        init_method=os.environ.get("NEOX_RENDEZVOUS", "env://"),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    check_same_configuration(args, device)
    pipe, data, tensor = form_groups(args)
    return Place(rank, world_size, local_rank, pipe, data, tensor, device)


def form_groups(args: NeoXArgs) -> tuple[int, int, int]:
    """DeepSpeed's and megatron-core's groups within an initialised world; returns this rank's (pipe, data, tensor)."""
    # DeepSpeed would compile a shared-memory backend for the CPU here: 46 s, and a traceback without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(args.distributed_backend, auto_mpi_discovery=False, verbose=False)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.model_parallel_size,
        pipeline_model_parallel_size=args.pipe_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        order="tp-cp-ep-dp-pp",  # innermost first: pipe, data, model as GPT-NeoX and DeepSpeed count
        create_gloo_process_groups=False,
    )
    return check_coordinates(args, dist.get_rank())


def _environment(args: NeoXArgs) -> tuple[int, int, int]:
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not in the environment: this script runs as a rank; start it by python deepy.py"
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world_size != args.global_num_gpus:
        raise ConfigError(f"{world_size} ranks were started, the configuration is made for {args.global_num_gpus}")
    return rank, world_size, local_rank


def _device(args: NeoXArgs, local_rank: int) -> torch.device:
    """This rank's device: the only visible GPU, or the one with the local rank's number."""
    if args.device == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise ConfigError("the configuration asks for GPUs, torch sees none; on a CPU write distributed_backend: gloo")
    index = 0 if visible == 1 else local_rank
    if index >= visible:
        raise ConfigError(f"local rank {local_rank} has no GPU: {visible} are visible; lower num_gpus")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_same_configuration(args: NeoXArgs, device: torch.device) -> None:
    """Raise ConfigError on all ranks if any two hold different configurations."""
    mark = int(args.digest[:15], 16)
    extremes = torch.tensor([mark, -mark], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise ConfigError("the ranks hold different configurations; give all of them the same files and overrides")


def check_coordinates(args: NeoXArgs, rank: int) -> tuple[int, int, int]:
    """This rank's (pipe, data, tensor), on which DeepSpeed's topology and megatron-core's groups must agree."""
    topology = PipeModelDataParallelTopology(
        num_pp=args.pipe_parallel_size, num_mp=args.model_parallel_size, num_dp=args.data_parallel_size
    )
    coordinate = topology.get_coord(rank)
    theirs = (coordinate.pipe, coordinate.data, coordinate.model)
    ours = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if ours != theirs:
        raise RuntimeError(f"rank {rank} is (pipe, data, tensor) {theirs} for DeepSpeed and {ours} for megatron-core")
    return ours
