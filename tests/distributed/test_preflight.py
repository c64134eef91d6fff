"""The preflight on real ranks of four virtual nodes: what does not come, does not end, or sums wrongly is named."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from tests.ranks import run_ranks
from tests.unit.configurations import keys

pytestmark = pytest.mark.distributed

PER_NODE = 2
TIMEOUT = 6  # seconds; a phase of eight healthy ranks takes a fraction of one


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def virtual_node(rank: int, world_size: int, port: int) -> None:
    """The environment that Slurm gives to a rank of `n0`, `n1`, ... with two ranks on each."""
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


def _preflight(rank: int, world_size: int, port: int, arguments: list[str], fault: str) -> str:
    """The command on one rank, after `fault` has been arranged for some of them."""
    from megatron.launcher.preflight import command_line, groups

    dist.destroy_process_group()
    virtual_node(rank, world_size, port)
    sums = groups.all_reduce
    if fault == "absent" and rank == 5:
        return ""
    if fault == "node absent" and rank in (4, 5):
        return ""
    if fault == "rank 0 absent" and rank == 0:
        return ""
    if fault == "before TP" and rank == 5:
        groups_of_kind = groups.process_group
        command_line.Preflight._sum_over = never
        assert groups_of_kind is not None
    if fault == "inside DP" and rank == 5:
        groups.all_reduce = lambda group, *rest: never() if dist.get_world_size(group) == 2 else sums(group, *rest)
    code = command_line.main(arguments)
    assert code == 0
    return ""


def preflight(folder: Path, fault: str = "", *arguments: str) -> list[tuple[int, str]]:
    """(exit code, output) of eight ranks, TP2 PP2 DP2."""
    config = folder / "run.yml"
    layout = keys(model_parallel_size=2, pipe_parallel_size=2, num_nodes=4, num_gpus=2)
    config.write_text(yaml.safe_dump(layout))
    words = [str(config), "--timeout", str(TIMEOUT), *arguments]
    return run_ranks(_preflight, 8, free_port(), words, fault, timeout=60, expect_failure=True)


def test_all_is_well(tmp_path: Path) -> None:
    results = preflight(tmp_path, "", "--no-screen")
    assert [code for code, _ in results] == [0] * 8, results
    report = results[0][1]
    assert "ranks: 8 on 4 nodes (n0, n1, n2, n3), 2 on each" in report
    assert "TP groups: 4 of 2 ranks" in report
    assert "PP groups: 4 of 2 ranks" in report
    assert "DP groups: 4 of 2 ranks" in report
    assert "world group: 1 of 8 ranks" in report
    assert "preflight: all is well" in report
    assert all(output == "" for _, output in results[1:]), results


@pytest.mark.parametrize(
    ("fault", "missing", "said"),
    [
        ("absent", [5], "rank 5 on n2 (pipe 1, data 0, tensor 1) did not arrive"),
        ("node absent", [4, 5], "node n2 is missing: none of its ranks 4-5 arrived"),
        ("before TP", [], "rank 5 on n2 (pipe 1, data 0, tensor 1) did not arrive at TP group (pipe 1, data 0)"),
    ],
)
def test_who_does_not_arrive_is_named(tmp_path: Path, fault: str, missing: list[int], said: str) -> None:
    results = preflight(tmp_path, fault, "--no-screen")
    assert [code for rank, (code, _) in enumerate(results) if rank not in missing] == [3] * (8 - len(missing)), results
    assert said in results[0][1], results[0][1]
    assert "Traceback" not in "".join(output for _, output in results)
