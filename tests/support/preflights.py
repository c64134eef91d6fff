"""Preflights of eight real ranks on four virtual nodes, with faults injected into some of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from tests.support.configurations import keys
from tests.support.ranks import run_ranks
from tests.support.rccl_logs import PLUGIN, SOCKETS
from tests.support.token_files import random_documents

PER_NODE = 2
RANKS = 8
# Seconds for a phase: with a fault that is detected by the time limit, and otherwise. Eight healthy ranks need a
# fraction of a second, and some more to start.
TIMEOUT, PATIENCE = 6, 60
# With an address of rank 0 that is not 127.0.0.1, its store serves other machines, as it would on several nodes.
BETWEEN_NODES = {"MASTER_ADDR": "127.0.0.2"}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def virtual_node(rank: int, world_size: int, port: int) -> None:
    """Set the environment that Slurm gives to a rank, with two ranks on each of `n0`, `n1`, ..."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    nodes = world_size // PER_NODE
    os.environ.update(
        SLURM_JOB_ID="1",
        SLURM_STEP_ID="0",
        SLURM_PROCID=str(rank),
        SLURM_NTASKS=str(world_size),
        SLURM_LOCALID=str(rank % PER_NODE),
        SLURM_NODEID=str(rank // PER_NODE),
        SLURM_STEP_NODELIST=f"n[0-{nodes - 1}]",
        SLURM_STEP_TASKS_PER_NODE=f"{PER_NODE}(x{nodes})",
        SLURMD_NODENAME=f"n{rank // PER_NODE}",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )


def never(*args: Any, **kwargs: Any) -> None:
    threading.Event().wait()


def killed(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raising(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("HIP error: out of memory")


def in_phase(name: str, instead: Callable[..., Any]) -> None:
    """Call `instead` in place of the work of a phase."""
    from megatron.preflight.phase_store import PhaseStore

    phase = PhaseStore.phase
    PhaseStore.phase = lambda store, phase_name, groups, work: phase(
        store, phase_name, groups, instead if phase_name == name else work
    )


def before_phase(name: str, instead: Callable[..., Any]) -> None:
    """Call `instead` in place of entering a phase."""
    from megatron.preflight.phase_store import PhaseStore

    phase = PhaseStore.phase
    PhaseStore.phase = lambda store, phase_name, *rest: (
        instead() if phase_name == name else phase(store, phase_name, *rest)
    )


def shorten(name: str) -> None:
    """Give a phase the time limit TIMEOUT."""
    from megatron.preflight.phase_store import PhaseStore

    phase = PhaseStore.phase

    def with_timeout(store: PhaseStore, phase_name: str, *rest: Any) -> list[Any]:
        store.timeout = TIMEOUT if phase_name == name else PATIENCE
        return phase(store, phase_name, *rest)

    PhaseStore.phase = with_timeout


def spoil(rank: int) -> None:
    """Make an all-reduce give one wrong element."""
    from megatron.preflight import groups

    all_reduce = dist.all_reduce

    def wrong(tensor: torch.Tensor, **kwargs: Any) -> None:
        all_reduce(tensor, **kwargs)
        tensor[17] += 1

    if rank == 3:
        groups.dist.all_reduce = wrong


def corrupt() -> None:
    """Make this rank send wrong data."""
    from megatron.preflight import measurements

    exchange = dist.batch_isend_irecv

    def wrong(operations: list[dist.P2POp]) -> list[dist.Work]:
        operations[0].tensor[5] += 1
        return exchange(operations)

    measurements.dist.batch_isend_irecv = wrong


def other_seed() -> None:
    from megatron.preflight import phases

    read = phases.rank_args
    phases.rank_args = lambda words: read([*words, "--seed", "2"])


def speeds(gemm: dict[int, float], copy: dict[int, float], link: Callable[[int, int], float]) -> Callable[[int], None]:
    """Replace measurements by numbers: 1 everywhere, except for the given nodes and links."""

    def replace(rank: int) -> None:
        from megatron.preflight import measurements

        node = rank // PER_NODE
        measurements.gemm_rate = lambda device: 140e12 * gemm.get(node, 1)
        measurements.memory_copy_rate = lambda device: 1300e9 * copy.get(node, 1)
        measurements.measured_link_rate = lambda partner, device: 20e9 * link(node, partner // PER_NODE)

    return replace


def rccl_logs(log_of_node: Callable[[int], str]) -> Callable[[int], None]:
    """Pretend that RCCL has written these logs."""

    def replace(rank: int) -> None:
        from megatron.preflight import phases, transport

        phases.Preflight.read_transport = lambda self: vars(transport.parse_rccl_log(log_of_node(rank // PER_NODE)))

    return replace


def slow_network(one: int, other: int) -> float:
    return 0.3 if 1 in (one, other) and one != other else 1.0


def slow_link(one: int, other: int) -> float:
    return 0.3 if {one, other} == {0, 1} else 1.0


def even(one: int, other: int) -> float:
    return 1.0


def of_ranks(ranks: set[int], action: Callable[..., None], *args: Any) -> Callable[[int], None]:
    return lambda rank: action(*args) if rank in ranks else None


def stall(
    rank: int, where: Callable[[str, Callable[..., Any]], None], phase: str, instead: Callable[..., Any]
) -> Callable[[int], None]:
    """One rank calls `instead` in place of a phase, which has TIMEOUT on all ranks."""

    def arrange(of_rank: int) -> None:
        shorten(phase)
        if of_rank == rank:
            where(phase, instead)

    return arrange


FAULTS: dict[str, Callable[[int], Any]] = {
    "none": lambda rank: None,
    "rank 5 is absent": lambda rank: rank == 5,
    "node n2 is absent": lambda rank: rank in (4, 5),
    "rank 0 is absent": lambda rank: rank == 0,
    "rank 5 stays away from its link": stall(5, before_phase, "node to node, round 1 of 3", never),
    "rank 5 stays away from TP": stall(5, before_phase, "the TP collectives", never),
    # The others await its verdict for the time limit of the previous phase, so here all phases have TIMEOUT.
    "rank 0 stays away from TP": of_ranks({0}, before_phase, "the TP collectives", never),
    "rank 5 stays away from forming": stall(5, before_phase, "the forming of the TP, PP and DP groups", never),
    "rank 5 hangs in PP": stall(5, in_phase, "the PP collectives", never),
    "rank 5 is killed in DP": stall(5, in_phase, "the DP collectives", killed),
    "rank 5 fails in DP": stall(5, in_phase, "the DP collectives", raising),
    "rank 0 is killed in DP": stall(0, in_phase, "the DP collectives", killed),
    "rank 3 sums wrongly": spoil,
    "rank 3 sends something else": of_ranks({3}, corrupt),
    "rank 6 has another seed": of_ranks({6}, other_seed),
    "n2 multiplies slowly": speeds({2: 0.3}, {}, even),
    "n2 copies slowly": speeds({}, {2: 0.3}, even),
    "n1 has a slow network": speeds({}, {}, slow_network),
    "a slow link": speeds({}, {}, slow_link),
    "all are alike": speeds({}, {}, even),
    "sockets on n2": rccl_logs(lambda node: SOCKETS if node == 2 else PLUGIN),
    "plugin everywhere": rccl_logs(lambda node: PLUGIN),
}


def _preflight(
    rank: int,
    world_size: int,
    ports: list[int],
    arguments: list[str],
    faults: list[str],
    environment: dict[str, str],
) -> None:
    """One rank of several preflights that run at the same time, eight ranks each."""
    from megatron.preflight.command_line import main

    dist.destroy_process_group()
    run, rank = divmod(rank, RANKS)
    virtual_node(rank, RANKS, ports[run])
    os.environ.update(environment)
    if FAULTS[faults[run]](rank) is not True:
        assert main(arguments) == 0


def preflights(
    folder: Path,
    faults: list[str],
    *arguments: str,
    timeout: int = PATIENCE,
    grace: float = 60,
    environment: dict[str, str] | None = None,
    **changes: Any,
) -> dict[str, list[tuple[int, str]]]:
    """(exit code, output) of eight ranks at TP2 PP2 DP2 by injected fault; all preflights run at the same time.

    `grace` is how many seconds a rank that does not end may continue after the first has ended; `environment` is in
    addition to Slurm's.
    """
    config = folder / "run.yml"
    layout: dict[str, Any] = {"model_parallel_size": 2, "pipe_parallel_size": 2, "num_nodes": 4, "num_gpus": 2}
    layout["train_data_paths"] = [random_documents(folder / "data", 4096)]
    config.write_text(yaml.safe_dump(keys(**layout | changes)))
    words = [str(config), "--timeout", str(timeout), *arguments]
    started = time.monotonic()
    world_size, ports = RANKS * len(faults), free_ports(len(faults))
    several = (ports, words, faults, environment or {})
    results = run_ranks(_preflight, world_size, *several, timeout=100, grace=grace, expect_failure=True)
    assert time.monotonic() - started < PATIENCE, "the end is bounded"
    assert "Traceback" not in "".join(output for _, output in results), results
    return {fault: results[RANKS * run : RANKS * (run + 1)] for run, fault in enumerate(faults)}


def preflight(folder: Path, fault: str, *arguments: str, **changes: Any) -> list[tuple[int, str]]:
    return preflights(folder, [fault], *arguments, **changes)[fault]


def failed_with(code: int, results: list[tuple[int, str]], *gone: int) -> str:
    """The report, after checking that all ranks that are not gone have ended with `code`."""
    codes = {rank: ended for rank, (ended, _) in enumerate(results) if rank not in gone}
    assert set(codes.values()) == {code}, results
    return "".join(output for _, output in results)
