"""The identity of a process from Slurm's variables, torchrun's, both, an incomplete set, or none."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.neox_arguments import ConfigError
from megatron.parallel.rank_env import StartedRank, expand_hosts, find_started_rank, node_name, set_rendezvous

pytestmark = pytest.mark.unit

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
TORCHRUN_BY_SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "8"}, None),
        (TORCH, StartedRank(5, 8, 1, None, "RANK")),
        (TORCH | {"LOCAL_WORLD_SIZE": "4"}, StartedRank(5, 8, 1, 4, "RANK")),
        (SLURM, StartedRank(5, 8, 1, 4, "SLURM_PROCID")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "3"}, StartedRank(3, 6, 1, 4, "SLURM_PROCID")),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,5"}, StartedRank(5, 8, 1, 5, "SLURM_PROCID")),
        (SLURM | TORCH, StartedRank(5, 8, 1, None, "RANK")),
        # torchrun as one task on each of two nodes: two tasks, eight ranks
        (SLURM | TORCH | TORCHRUN_BY_SRUN, StartedRank(5, 8, 1, None, "RANK")),
        # the batch script itself and an interactive shell are not ranks
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, None),
        (SLURM | {"SLURM_STEP_ID": "4294967291"}, None),
    ],
)  # fmt: skip
def test_sources(env: dict[str, str], expected: StartedRank | None) -> None:
    assert find_started_rank(env) == expected


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (SLURM | TORCH | {"RANK": "0"}, "two launchers disagree: .* rank 0 of 8 .* rank 5 of 8"),
        (SLURM | TORCH | {"WORLD_SIZE": "1", "RANK": "0"}, "two launchers disagree"),
        (SLURM | TORCH | {"LOCAL_RANK": "0"}, "two launchers disagree"),
        ({"RANK": "0"}, "RANK set without WORLD_SIZE, LOCAL_RANK"),
        (TORCH | {"RANK": "8"}, "rank 8 of 8"),
        (TORCH | {"RANK": "-1"}, "rank -1 of 8"),
        (TORCH | {"RANK": "five"}, "RANK is 'five', expected a number"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"}, "without SLURM_PROCID, SLURM_LOCALID"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "without SLURM_NTASKS"),
    ],
)
def test_impossible_settings_are_rejected(env: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_started_rank(env)


@pytest.mark.parametrize(
    ("hostlist", "hosts"),
    [
        ("login1", ["login1"]),
        ("n[0-3]", ["n0", "n1", "n2", "n3"]),
        ("frontier[00012-00014,00020],login1", ["frontier00012", "frontier00013", "frontier00014", "frontier00020",
        "login1"]), ("a[1-2]b[3,5]", ["a1b3", "a1b5", "a2b3", "a2b5"]),
        ("nid[0099-0101]-hsn0", ["nid0099-hsn0", "nid0100-hsn0", "nid0101-hsn0"]),
    ],
)  # fmt: skip
def test_host_lists(hostlist: str, hosts: list[str]) -> None:
    assert expand_hosts(hostlist) == hosts


@pytest.mark.parametrize("hostlist", ["", "n[", "n]0[", "n[3-1]", "n[a-b]", "n[1,]", ",", "a,,b"])
def test_invalid_host_lists_are_rejected(hostlist: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        expand_hosts(hostlist)


def rendezvous(**env: Any) -> tuple[str, str]:
    found = dict(env)
    set_rendezvous(found)
    return found["MASTER_ADDR"], found["MASTER_PORT"]


def test_ranks_meet_at_the_first_node() -> None:
    address, port = rendezvous(**SLURM, SLURM_STEP_NODELIST="n[7-8]", SLURM_JOB_NODELIST="n[5-8]")
    assert address == "n7"
    assert 20000 <= int(port) < 32000


def test_jobs_and_steps_meet_apart() -> None:
    ports = {
        rendezvous(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step), SLURM_JOB_NODELIST="n1")[1]
        for job in range(100, 110)
        for step in range(5)
    }
    assert len(ports) == 50


def test_the_rendezvous_of_the_user_wins() -> None:
    assert rendezvous(MASTER_ADDR="here", MASTER_PORT="1234", **SLURM) == ("here", "1234")


def test_nobody_says_where_to_meet() -> None:
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        rendezvous()


def test_nodes_have_their_slurm_names() -> None:
    """Virtual nodes share a host, and `--exclude` needs Slurm's name."""
    assert node_name({"SLURMD_NODENAME": "n3"}) == "n3"
    assert node_name({}) != ""
