"""Chooses a rank's GPU, and checks and prints the placement of all ranks: node, GCD, NUMA domain, coordinates.

Pure functions over plain values, so that 2,048 ranks of a 70B model can be checked without starting any. Source for the
MI250X node: OLCF's Frontier user guide; LUMI's nodes are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.common.columns import align_columns
from megatron.common.errors import ConfigError

# The GCD that Slurm's `--gpu-bind=closest` gives to each of eight local ranks: the one attached to the rank's cores.
CLOSEST_GCDS = (4, 5, 2, 3, 6, 7, 0, 1)

# HIP renumbers the GPUs that ROCR leaves visible; it reads CUDA_VISIBLE_DEVICES as an alias of its own variable.
_OUTER, _INNER = "ROCR_VISIBLE_DEVICES", ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Seat:
    """One rank's place in the machine and in the model. `device` identifies the GPU on its node, None on a CPU."""

    rank: int
    node: str
    local_rank: int
    pipe: int
    data: int
    tensor: int
    device: str | None = None


def coordinates(rank: int, pipe_size: int, data_size: int, tensor_size: int) -> tuple[int, int, int]:
    """(pp_rank, dp_rank, tp_rank) of a rank: tensor-parallel ranks are adjacent, pipeline stages furthest apart."""
    if not 0 <= rank < pipe_size * data_size * tensor_size:
        raise ValueError(f"rank {rank} is not one of {pipe_size} x {data_size} x {tensor_size}")
    return rank // (data_size * tensor_size), rank // tensor_size % data_size, rank % tensor_size


def device_index(local_rank: int, local_world_size: int | None, visible: int, env: Mapping[str, str]) -> int:
    """Index of a local rank's GPU among the visible ones.

    0 if one GPU is visible (`--gpus-per-task=1`, or a wrapper that sets ROCR_VISIBLE_DEVICES); the local rank if all
    GPUs of a node are visible (LUMI). Raises ConfigError for anything in between, and if a GPU is masked twice.
    """
    check_masks(env)
    if visible == 0:
        raise ConfigError("the configuration asks for GPUs, torch sees none; on a CPU write distributed_backend: gloo")
    if visible == 1:
        return 0
    if local_world_size is not None and visible < local_world_size:
        raise ConfigError(
            f"{visible} GPUs are visible to each of {local_world_size} ranks of this node; make one GPU visible to "
            f"each rank (--gpus-per-task=1), or all GPUs to all ranks (--gpus-per-node={local_world_size})"
        )
    if local_rank >= visible:
        raise ConfigError(f"local rank {local_rank} has no GPU: {visible} are visible; lower num_gpus")
    return local_rank


def check_masks(env: Mapping[str, str]) -> None:
    """Raise ConfigError if HIP's mask names a GPU that ROCR's mask has removed, or if HIP's two masks differ."""
    outer = _mask(env, _OUTER)
    for name in _INNER:
        inner = _mask(env, name)
        if outer is None or inner is None or not all(item.isdigit() for item in inner):
            continue
        if max(map(int, inner), default=0) >= len(outer):
            raise ConfigError(
                f"{_OUTER}={env[_OUTER]} leaves {len(outer)} GPUs, numbered from 0 again, and {name}={env[name]} asks "
                f"for one beyond them: the same GPU is masked twice. Unset {name}"
            )
    hip, cuda = (_mask(env, name) for name in _INNER)
    if hip is not None and cuda is not None and hip != cuda:
        raise ConfigError(
            f"HIP_VISIBLE_DEVICES={env['HIP_VISIBLE_DEVICES']} and CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']} "
            "contradict each other; unset one"
        )


def _mask(env: Mapping[str, str], name: str) -> list[str] | None:
    value = env.get(name)
    return None if value is None else [item.strip() for item in value.split(",") if item.strip()]


def check_tensor_groups(seats: Sequence[Seat]) -> None:
    """Raise ConfigError if a tensor-parallel group spans nodes: its traffic needs the fast links within a node."""
    groups: dict[tuple[int, int], list[Seat]] = defaultdict(list)
    for seat in seats:
        groups[seat.pipe, seat.data].append(seat)
    torn = [group for group in groups.values() if len({seat.node for seat in group}) > 1]
    if not torn:
        return
    first = ", ".join(f"rank {seat.rank} on {seat.node}" for seat in torn[0])
    raise ConfigError(
        f"{len(torn)} of {len(groups)} tensor-parallel groups leave their node, the first is {first}. Start a multiple "
        f"of model_parallel_size ranks on each node, numbered node by node (srun --distribution=block)"
    )


def check_devices(seats: Sequence[Seat]) -> None:
    """Raise ConfigError if two ranks of a node have taken the same GPU."""
    taken: dict[tuple[str, str], Seat] = {}
    for seat in seats:
        if seat.device is None:
            continue
        other = taken.setdefault((seat.node, seat.device), seat)
        if other is not seat:
            raise ConfigError(
                f"ranks {other.rank} and {seat.rank} on {seat.node} have taken the same GPU {seat.device} (local ranks "
                f"{other.local_rank} and {seat.local_rank}); bind one GPU to each task, or make all visible to all"
            )


def seat_table(seats: Sequence[Seat], numa: Mapping[int, int | None] | None = None) -> list[str]:
    """A table, one line per rank: rank, node, local rank, device, NUMA domain, coordinates. `numa` is keyed by rank."""
    rows = [("rank", "node", "local", "device", "numa", "pipe", "data", "tensor")]
    for seat in seats:
        domain = (numa or {}).get(seat.rank)
        rows.append(
            (
                str(seat.rank),
                seat.node,
                str(seat.local_rank),
                seat.device or "cpu",
                "-" if domain is None else str(domain),
                str(seat.pipe),
                str(seat.data),
                str(seat.tensor),
            )
        )
    return align_columns(rows, right=range(len(rows[0])))


def seat_summary(seats: Sequence[Seat]) -> str:
    """One line about all ranks that passed `check_tensor_groups`: number of nodes, ranks on each."""
    by_node: dict[str, int] = defaultdict(int)
    for seat in seats:
        by_node[seat.node] += 1
    counts = sorted(set(by_node.values()))
    nodes = list(by_node)
    names = ", ".join(nodes) if len(nodes) <= 4 else f"{nodes[0]} to {nodes[-1]}"
    return (
        f"ranks: {len(seats)} on {len(nodes)} node{'s' * (len(nodes) > 1)} ({names}), "
        f"{' or '.join(map(str, counts))} on each; every tensor-parallel group is inside one node"
    )
