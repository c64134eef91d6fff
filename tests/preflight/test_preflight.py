"""The preflight on eight real ranks of four virtual nodes names ranks that are missing, hanging, failing or slow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.preflights import BETWEEN_NODES, TIMEOUT, failed_with, free_ports, preflight, preflights

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]


def test_all_is_well(tmp_path: Path) -> None:
    exclude = tmp_path / "exclude"
    results = preflight(
        tmp_path, "all are alike", "--exclude-file", str(exclude), environment=BETWEEN_NODES, isolate_documents=True
    )
    report = failed_with(0, results)
    assert report == results[0][1], "rank 0 alone speaks"
    for line in (
        "isolated documents a call of attention for each (varlen attention needs a GPU)",
        "note: messages between nodes are not sealed",
        "ranks: 8 on 4 nodes (n0, n1, n2, n3), 2 on each",
        "TP groups: 4 of 2 ranks, all-reduce of 0.25 MiB right",
        "PP groups: 4 of 2 ranks",
        "DP groups: 4 of 2 ranks",
        "world group: 1 of 8 ranks",
        "transport: gloo over TCP sockets, by choice",
        "preflight: all is well",
    ):
        assert line in report, report
    assert "slow node" not in report
    assert exclude.read_text() == ""


def test_the_command_in_the_note_seals_the_messages(tmp_path: Path) -> None:
    from megatron.preflight.phases import UNSEALED

    export, _, _ = UNSEALED.partition("them: ")[2].partition(" before srun")
    shown = subprocess.run(["bash", "-c", f"{export}; env"], capture_output=True, text=True, check=True).stdout
    (secret,) = re.findall(r"^NEOX_SECRET=([0-9a-f]{64})$", shown, re.M)
    results = preflight(tmp_path, "all are alike", "--no-screen", environment=BETWEEN_NODES | {"NEOX_SECRET": secret})
    report = failed_with(0, results)
    assert "all is well" in report
    assert "sealed" not in report
    assert secret not in report


ABSENT = [
    ("rank 5 is absent", [5], ["at the start", "rank 5 on n2 (pipe 1, data 0, tensor 1) did not arrive"]),
    ("node n2 is absent", [4, 5], ["node n2 is missing: none of its ranks 4-5 arrived"]),
    ("rank 0 is absent", [0], ["rank 0 on n0 did not arrive within 6 s", "127.0.0.1"]),
]
STALLS: list[Any] = [
    (
        "rank 5 stays away from its link",
        [],
        ["rank 5 on n2 (pipe 1, data 0, tensor 1) did not arrive at link, ranks 5, 7 on 2 nodes (n2, n3)"],
    ),
    (
        "rank 5 stays away from TP",
        [],
        ["rank 5 on n2 (pipe 1, data 0, tensor 1) did not arrive at TP group (pipe 1, data 0), ranks 4-5 on n2"],
    ),
    (
        "rank 5 stays away from forming",
        [],
        ["the forming of the TP, PP and DP groups", "rank 5 on n2 (pipe 1, data 0, tensor 1) did not arrive"],
    ),
    (
        "rank 5 hangs in PP",
        [],
        ["PP group (data 0, tensor 1) stalls: ranks 1, 5 on 2 nodes (n0, n2), all of which arrived"],
    ),
    (
        "rank 5 is killed in DP",
        [5],
        ["DP group (pipe 1, tensor 1) stalls: ranks 5, 7 on 2 nodes (n2, n3)", "rank 5 on n2"],
    ),
    ("rank 5 fails in DP", [], ["DP group (pipe 1, tensor 1) stalls", "rank 5 on n2: RuntimeError: HIP error"]),
    (
        "rank 0 is killed in DP",
        [0],
        ["rank 0 on n0 (pipe 0, data 0, tensor 0) did not arrive at the "],
    ),
    (
        "rank 3 sends something else",
        [],
        [
            "link fails: ranks 1, 3 on 2 nodes (n0, n1)",
            "rank 1 on n0: RuntimeError: 1 of 262144 elements sent by rank 3",
        ],
    ),
    (
        "rank 3 sums wrongly",
        [],
        ["TP group (pipe 0, data 1), ranks 2-3 on n1: wrong sums on rank 3, in up to 1 of 65536 elements"],
    ),
]
AT_ONCE = 3  # preflights; they mostly wait for the end of a phase


@pytest.fixture(scope="module")
def stalled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[int, str]]]:
    """Results of a fault, which runs together with its neighbors in STALLS."""
    known: dict[str, list[tuple[int, str]]] = {}
    names = [stall[0] for stall in STALLS]

    def results(fault: str) -> list[tuple[int, str]]:
        if fault not in known:
            first = names.index(fault) // AT_ONCE * AT_ONCE
            folder = tmp_path_factory.mktemp("stalls")
            known.update(preflights(folder, names[first : first + AT_ONCE], "--no-screen"))
        return known[fault]

    return results


@pytest.mark.parametrize(("fault", "gone", "expected"), ABSENT)
def test_ranks_that_do_not_start_are_named(tmp_path: Path, fault: str, gone: list[int], expected: list[str]) -> None:
    report = failed_with(3, preflight(tmp_path, fault, "--no-screen", timeout=TIMEOUT), *gone)
    for text in expected:
        assert text in report, report
    if 0 not in gone:
        assert report.count("did not arrive") + report.count("none of its ranks") == 1, report


@pytest.mark.parametrize(("fault", "gone", "expected"), STALLS)
def test_stalls_are_reported(
    stalled: Callable[[str], list[tuple[int, str]]], fault: str, gone: list[int], expected: list[str]
) -> None:
    report = failed_with(3, stalled(fault), *gone)
    for text in expected:
        assert text in report, report
    if "rank 0 on" not in expected[0]:  # one rank reports, and no other is blamed
        assert report.count("did not arrive") + report.count(" stalls: ") + report.count("wrong sums") <= 1, report


@pytest.mark.slow  # the other ranks wait longer than rank 0
def test_a_missing_rank_0_is_reported(tmp_path: Path) -> None:
    report = failed_with(
        3, preflight(tmp_path, "rank 0 stays away from TP", "--no-screen", timeout=TIMEOUT, grace=10), 0
    )
    assert "rank 0 on n0 (pipe 0, data 0, tensor 0) did not arrive at the TP collectives, or is gone" in report, report


@pytest.mark.parametrize(
    ("fault", "node", "reason"),
    [
        ("n2 multiplies slowly", "n2", "GEMM fp32 0.30 of the median (rank 4)"),
        ("n2 copies slowly", "n2", "memory copy 0.30 of the median (rank 4)"),
        ("n1 has a slow network", "n1", "network 0.30 of the median"),
    ],
)
def test_a_slow_node_is_named(tmp_path: Path, fault: str, node: str, reason: str) -> None:
    results = preflight(tmp_path, fault, "--slow-nodes", "fail", "--exclude-file", str(tmp_path / "exclude"))
    report = failed_with(4, results)
    assert f"slow node {node}: {reason}" in report, report
    assert f"1 of 4 nodes are slow; leave them out: --exclude={node}\n" in report
    assert (tmp_path / "exclude").read_text() == f"{node}\n"


def test_a_slow_link_is_named_and_excludes_nobody(tmp_path: Path) -> None:
    report = failed_with(
        0, preflight(tmp_path, "a slow link", "--slow-nodes", "fail", "--exclude-file", f"{tmp_path}/exclude")
    )
    assert "slow link between nodes that are not slow with others: n0 - n1: 12 GB/s, 0.30 of the median" in report
    assert "slow node" not in report
    assert (tmp_path / "exclude").read_text() == ""


def test_slow_nodes_may_be_a_warning(tmp_path: Path) -> None:
    """This is the default on CPUs."""
    report = failed_with(0, preflight(tmp_path, "n2 multiplies slowly", "--exclude-file", str(tmp_path / "exclude")))
    assert "slow node n2: GEMM" in report
    assert "preflight: all is well" in report
    assert (tmp_path / "exclude").read_text() == "n2\n"


def test_real_measurements(tmp_path: Path) -> None:
    """Without replacements, with megatron-core's links; results must be present, but their values are not checked."""
    megatron = {"engine": "megatron", "virtual_pipe_parallel_size": 2, "num_layers": 4}
    report = failed_with(0, preflight(tmp_path, "none", **megatron, gradient_accumulation_steps=2))
    rows = [line.split() for line in report.splitlines() if line.startswith(("n0 ", "n1 ", "n2 ", "n3 "))]
    numbers = {row[0]: [float(value) for value in row[1:]] for row in rows}
    assert {node: len(row) for node, row in numbers.items()} == {f"n{node}": 5 for node in range(4)}, report
    assert all(value > 0 for row in numbers.values() for value in row), report
    # On a busy machine one of the four links may be far below the median, which a line of its own says.
    links = r"stages: 4 pairs, .* directed links, right.*\n(slow link: .*\n)*.*no device memory.*\n.*nothing to choose"
    assert re.search(links, report), report


def test_a_fallback_to_sockets_is_named(tmp_path: Path) -> None:
    report = failed_with(5, preflight(tmp_path, "sockets on n2", "--no-screen"))
    assert "ranks 4-5 on n2: TCP sockets (NET/Plugin : No plugin found (librccl-net.so)" in report, report
    assert "NCCL_NET" in report


def test_the_plugin_on_all_nodes_passes(tmp_path: Path) -> None:
    report = failed_with(0, preflight(tmp_path, "plugin everywhere", "--no-screen"))
    assert "transport: AWS Libfabric, provider cxi on all 8 ranks" in report


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_gpus": 4}, "8 ranks were started, but global_num_gpus"),
        ({"model_parallel_size": 4, "pipe_parallel_size": 1}, "2 of 2 tensor-parallel groups leave their node"),
        ({"hidden_siz": 128}, "unknown key hidden_siz"),
    ],
)
def test_impossible_input_stops_all_ranks_with_code_2(tmp_path: Path, changes: dict[str, int], said: str) -> None:
    report = failed_with(2, preflight(tmp_path, "none", "--no-screen", **changes))
    assert report.count(said) == 1, report


SRUN = """\
srun() {
    for task in 0 1; do
        SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task SLURM_NODEID=0 \\
            SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=n0 SLURMD_NODENAME=n0 "${@:2}" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || return; done
}
sbatch() { echo "sbatch $*"; }
"""


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """The commands of docs/preflight.md as written, with shell stand-ins for srun and sbatch."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/preflight.md").read_text(), re.MULTILINE | re.DOTALL)
    blocks = [block.replace("local.yml", "local.yml --no-inputs") for block in blocks]  # the demo's inputs do not exist
    for name, path in (("model.yml", "model.yml"), ("run.yml", "run.yml")):
        (tmp_path / name).symlink_to(ROOT / "configs/tiny" / path)
    (tmp_path / "local.yml").write_text("num_gpus: 2\npipe_parallel_size: 2\ndistributed_backend: gloo\n")
    for name, module in (("torchrun", "-m torch.distributed.run"), ("python", "")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        ["bash", "-c", "set -e\n" + SRUN + "\n".join(blocks)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("preflight: all is well") == 2, result.stdout + result.stderr
    assert "sbatch --exclude= job.sh" in result.stdout


def test_ranks_with_different_configurations_stop(tmp_path: Path) -> None:
    report = failed_with(2, preflight(tmp_path, "rank 6 has another seed", "--no-screen"))
    assert "rank 6 on n3 (pipe 1, data 1, tensor 0) hold different configurations" in report, report
