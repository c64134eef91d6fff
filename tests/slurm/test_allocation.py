"""deepy.py without the template: in an allocation from salloc or from a custom batch script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.parallel.rank_env import expand_hosts
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import ODD, configure, light_project

pytestmark = pytest.mark.slurm


def allocated(
    cluster: Cluster, folder: Path, *options: str, plan: str = "done", typed: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run deepy.py with the light program on 2 x 2 ranks, in an allocation with these options of salloc."""
    project = folder / "project"
    if not project.exists():
        light_project(project)
    deepy = [sys.executable, str(project / "deepy.py"), str(project / "train.py"), *configure(folder)]
    deepy += ["--paths-on-nodes", *typed]
    return subprocess.run(
        ["salloc", *options, *deepy],
        cwd=folder,
        env=cluster.env | {"PLAN": plan, "ODD": ODD},
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )


def test_one_srun_starts_all_ranks(cluster: Cluster, tmp_path: Path) -> None:
    result = allocated(cluster, tmp_path, "--nodes=2", "--cpus-per-task=3")
    assert result.returncode == 0, result.stderr
    for rank in range(4):
        found = json.loads((tmp_path / f"seen-0-{rank}.json").read_text())
        assert found["env"]["SLURMD_NODENAME"] == f"n{rank // 2}"
        assert found["env"]["SLURM_LOCALID"] == str(rank % 2)
        assert found["env"]["ODD"] == ODD
        assert found["env"]["SLURM_CPUS_PER_TASK"] == "3", "since 22.05 srun does not take it from the job"
        assert found["argv"][1] == "--neox-args"
    assert not list(tmp_path.rglob(".neox_run_*"))


def test_advice_on_keys_decided_by_slurm_works(cluster: Cluster, tmp_path: Path) -> None:
    """Nodes by --nodelist and --exclude, a comment by salloc, all nodes by deepy.py whatever `launcher` names."""
    refused = allocated(cluster, tmp_path, "--nodes=2", typed=("--include", "n2@n3"))
    assert refused.returncode == 2
    (options,) = re.findall(r"Slurm's (--\w+ and --\w+)", refused.stderr)
    assert options == "--nodelist and --exclude"
    asked = ("--nodes=2", "--nodelist=n[2-3]", "--exclude=n0", "--comment=stars")
    result = allocated(cluster, tmp_path, *asked, typed=("--launcher", "pdsh", "--comment", "stars"))
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "itself starts all nodes with srun" in said
    assert "the job gets them from sbatch or salloc" in said
    seen = [json.loads((tmp_path / f"seen-0-{rank}.json").read_text())["env"] for rank in range(4)]
    assert [env["SLURMD_NODENAME"] for env in seen] == ["n2", "n2", "n3", "n3"]


@pytest.mark.parametrize(
    ("plan", "code", "said"),
    [
        ("user", 2, "error: the sky is too cloudy"),
        ("stuck", 75, "stopped: a stop without a new save"),
        ("bug", 1, "failed: KeyError: 'telescope'"),
    ],
)
def test_deepy_returns_the_exit_code_of_the_ranks(
    cluster: Cluster, tmp_path: Path, plan: str, code: int, said: str
) -> None:
    result = allocated(cluster, tmp_path, "--nodes=2", plan=plan)
    assert result.returncode == code, result.stderr
    assert result.stderr.count(said) == 1, result.stderr


def test_an_allocation_of_another_size_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    result = allocated(cluster, tmp_path, "--nodes=1")
    assert result.returncode == 2
    assert "the allocation has 1 node, but the configuration is for num_nodes 2" in result.stderr
    assert not list(tmp_path.glob("seen-*"))
    (option,) = re.findall(r"or give (--num_nodes \d)", result.stderr)
    assert allocated(cluster, tmp_path, "--nodes=1", typed=tuple(option.split())).returncode == 0
    assert len(list(tmp_path.glob("seen-*"))) == 2


def test_no_allocation_at_all(tmp_path: Path) -> None:
    project = light_project(tmp_path / "project")
    deepy = [sys.executable, str(project / "deepy.py"), str(project / "train.py"), *configure(tmp_path)]
    deepy.append("--paths-on-nodes")
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for more, said in (
        ([], "num_nodes is 2, but this is not a Slurm allocation"),
        (["--launcher", "slurm"], "launcher: slurm outside a Slurm allocation"),
    ):
        result = subprocess.run([*deepy, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
        assert result.returncode == 2
        assert said in result.stderr
        assert "docs/launching.md" in result.stderr


@pytest.mark.parametrize("hostlist", ["n[0-3]", "frontier[00012-00014,00020],login1", "a[1-2]b[3,5]"])
def test_host_lists_are_read_as_scontrol_reads_them(cluster: Cluster, hostlist: str) -> None:
    assert cluster.run("scontrol", "show", "hostnames", hostlist).split() == expand_hosts(hostlist)
