"""Reads a rank's environment: its number and the number of ranks, its node, the address of the rendezvous.

A rank is started by `srun` (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID), or by torchrun or deepy.py (RANK, WORLD_SIZE,
LOCAL_RANK). Contradictory variables are an error: DeepSpeed and mpi4py guess, and after a wrong guess every process is
rank 0 of 1. Standard library only, no ssh, no hostfile.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron.common.errors import ConfigError

TYPED = "NEOX_TYPED"  # variable with the file descriptor of the terminal's input, if it is not 0

# Warnings that every rank would print: megatron-core's about libraries that this project does not need, torch's about
# names that DeepSpeed and megatron-core still use.
IGNORED_WARNINGS = (
    "ignore:Transformer Engine and Apex are not installed",
    "ignore:`torch.distributed.all_gather_into_tensor` is deprecated",
    "ignore:`torch.distributed.reduce_scatter_tensor` is deprecated",
)

PORTS = range(20000, 32000)  # below Linux's ephemeral ports, which begin at 32768


def without_compiler(environment: MutableMapping[str, str]) -> None:
    """Let a Python process with this environment import megatron-core without torch's compiler.

    Nothing here is compiled, but megatron-core and DeepSpeed wrap functions in torch.compile when imported, which loads
    the compiler: a third of the CPU time of a rank's imports, and 570 of the 3,600 files that they read.
    """
    environment.setdefault("TORCHDYNAMO_DISABLE", "1")


@dataclass(frozen=True)
class StartedRank:
    """How this process was started: global and node-local rank, number of ranks in the run and on the node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None  # None if the source does not provide it
    source: str  # the variable that rank was read from, for messages


def find_started_rank(env: Mapping[str, str]) -> StartedRank | None:
    """How this process was started, None if not as a rank. ConfigError for incomplete or contradictory variables."""
    torch, slurm = _from_torch(env), _from_slurm(env)
    if torch is None or slurm is None:
        return torch or slurm
    # If torchrun is a Slurm task, its variables number the ranks, and Slurm's number torchrun's agents.
    if "TORCHELASTIC_RUN_ID" in env or slurm.world_size == 1:
        return torch
    if (torch.rank, torch.world_size, torch.local_rank) != (slurm.rank, slurm.world_size, slurm.local_rank):
        raise ConfigError(
            f"two launchers disagree: RANK, WORLD_SIZE and LOCAL_RANK say rank {torch.rank} of {torch.world_size} "
            f"(local {torch.local_rank}), Slurm says rank {slurm.rank} of {slurm.world_size} (local "
            f"{slurm.local_rank}). Variables exported in the batch script are the same for every task: unset RANK, "
            f"WORLD_SIZE and LOCAL_RANK there and let srun number the ranks"
        )
    return torch


def _from_torch(env: Mapping[str, str]) -> StartedRank | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in env]
    if not given or given == ["WORLD_SIZE"]:  # batch scripts often export WORLD_SIZE alone
        return None
    missing = [name for name in names if name not in env]
    if missing:
        raise ConfigError(f"{', '.join(given)} set without {', '.join(missing)}: set all three or none")
    rank, world_size, local_rank = (_number(env, name) for name in names)
    local_world_size = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None
    return _checked(StartedRank(rank, world_size, local_rank, local_world_size, "RANK"))


def _from_slurm(env: Mapping[str, str]) -> StartedRank | None:
    """The rank that Slurm started; None outside a job step: the batch script has SLURM_PROCID 0 too, but is no rank."""
    if not in_step(env):
        return None
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in env]
    total = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in env), None)
    if missing or total is None:
        raise ConfigError(
            f"this is a Slurm step without {', '.join(missing) or 'SLURM_NTASKS'}: start the ranks by srun, and do not "
            f"unset Slurm's variables"
        )
    per_node = _tasks_on_this_node(env)
    return _checked(
        StartedRank(
            _number(env, "SLURM_PROCID"), _number(env, total), _number(env, "SLURM_LOCALID"), per_node, "SLURM_PROCID"
        )
    )


def in_step(env: Mapping[str, str]) -> bool:
    """Whether this process runs inside a step started by srun, including an interactive shell."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < 0xFFFFFFF0  # higher numbers are the batch script, an interactive shell, ...


def _tasks_on_this_node(env: Mapping[str, str]) -> int | None:
    counts, node = _tasks_per_node(env), env.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def _tasks_per_node(env: Mapping[str, str]) -> list[int]:
    """From `SLURM_STEP_TASKS_PER_NODE`, such as `8(x256)` or `8(x2),4`; empty if it is not set."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def planned_nodes(env: Mapping[str, str]) -> list[str]:
    """The node that Slurm planned for each rank, also for ranks that never start; empty if Slurm does not provide it.

    Ranks must be numbered node by node. Raises ConfigError for a node list that cannot be read.
    """
    hosts = env.get("SLURM_STEP_NODELIST", "")
    names, counts = expand_hosts(hosts) if hosts else [], _tasks_per_node(env)
    if not in_step(env) or len(names) != len(counts):
        return []
    return [name for name, count in zip(names, counts, strict=True) for _ in range(count)]


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"{name} is {env[name]!r}, expected a number") from None


def _checked(started: StartedRank) -> StartedRank:
    if 0 <= started.rank < started.world_size and started.local_rank >= 0:
        return started
    raise ConfigError(
        f"{started.source} gives rank {started.rank} of {started.world_size}, local rank {started.local_rank}: "
        f"expected numbers from 0 and a rank below the number of ranks"
    )


def node_name(env: Mapping[str, str]) -> str:
    """This node's name as the batch system, and thus `--exclude`, spells it."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def expand_hosts(hostlist: str) -> list[str]:
    """Expand a Slurm host list such as `frontier[00012-00014,00020],login1`, without scontrol, which containers lack.

    Raises ConfigError if the list cannot be read.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", hostlist)
    if ",".join(parts) != hostlist or not parts:
        raise ConfigError(f"host list {hostlist!r} cannot be read, expected something like node[001-004,7]")
    return [host for part in parts for host in _expand(part)]


def _expand(part: str) -> list[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, after = rest.partition("]")
    names = []
    for piece in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"host list {part!r} cannot be read: {piece!r} is not a number or a range")
        first, last, width = int(match[1]), int(match[2] or match[1]), len(match[1])
        names += [f"{before}{number:0{width}d}" for number in range(first, last + 1)]
    return [name + end for name in names for end in (_expand(after) if after else [""])]


def set_rendezvous(env: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT for ranks that Slurm started, unless the batch script has set them.

    The first node of the step runs rank 0. The port is derived from job and step IDs, so that two jobs on one node use
    different ports. Raises ConfigError if neither Slurm nor the user provides an address.
    """
    if "MASTER_ADDR" not in env:
        hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if not hosts:
            raise ConfigError(
                "MASTER_ADDR is not set and Slurm names no nodes: export MASTER_ADDR, the name of rank 0's node"
            )
        env["MASTER_ADDR"] = expand_hosts(hosts)[0]
    if "MASTER_PORT" not in env:
        job, step = (int(re.sub(r"\D", "", env.get(name, "")) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        env["MASTER_PORT"] = str(PORTS[(job * 7 + step) % len(PORTS)])


def started_as_rank() -> bool:
    """Whether a launcher started this process as a rank; a single Slurm task does not count."""
    started = find_started_rank(os.environ)
    return started is not None and (started.source == "RANK" or started.world_size > 1)
