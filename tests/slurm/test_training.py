"""The rendered generic template under a real Slurm: the tiny model on two nodes, through a night of failures."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.checkpoint.discovery import complete_steps
from megatron.supervision.failures import REQUEUE
from tests.support.deepy_runs import CASE, ROOT, losses, saving_at_the_end, write_run
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import finished, log_of, rendered
from tests.support.token_files import random_documents

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def configure(folder: Path, data: str) -> list[str]:
    """Configuration files for TP2 x PP2, saving only at the end; the machine has its own file."""
    settings = {"log_dir": "log", "model_parallel_size": 2, "pipe_parallel_size": 2}
    write_run(folder / "run.yml", data, **settings, **saving_at_the_end(60, "checkpoints"))
    (folder / "two_nodes.yml").write_text(yaml.safe_dump({"num_nodes": 2, "num_gpus": 2}))
    return ["run.yml", "two_nodes.yml"]


@pytest.fixture(scope="module")
def uninterrupted(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of an uninterrupted run of deepy.py without Slurm."""
    folder = tmp_path_factory.mktemp("local")
    configure(folder, data)
    command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), "run.yml", "--num_gpus", "4"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=200)
    return losses(folder)


def until(cluster: Cluster, folder: Path, job: str, start: int, steps: int) -> str:
    """Wait until a job's start, counted from 1, has done some steps; returns Slurm's name of the training step."""

    def trained() -> bool:
        # A requeued job is COMPLETING until its previous nodes have cleaned up.
        known = ("COMPLETING", "PENDING", "CONFIGURING", "RUNNING")
        assert cluster.state(job) in known, log_of(folder, job)[-3000:]
        log = log_of(folder, job).partition(f"launch: job {job}, start {start} ")[2]
        return len(re.findall(r"^iteration ", log, re.MULTILINE)) >= steps

    cluster.until(trained, f"{steps} steps", 200)
    running = cluster.run("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i").split()
    (name,) = (step for step in running if step.rpartition(".")[2].isdigit())
    return name


@pytest.mark.timeout(600)
def test_a_night(cluster: Cluster, data: str, tmp_path: Path, uninterrupted: dict[int, float]) -> None:
    """A rank is killed, the time limit approaches, a node is lost; the fourth start ends like an uninterrupted run."""
    script = rendered(tmp_path, ROOT, "--signal-seconds=60", configs=configure(tmp_path, data))
    job = cluster.submit(script, TMPDIR=str(tmp_path))

    step_names = [until(cluster, tmp_path, job, 1, 2)]
    (culprit,) = cluster.processes(f"SLURM_JOB_ID={job}", "SLURM_PROCID=2", "SLURM_NTASKS=4")
    os.kill(culprit, signal.SIGKILL)
    cluster.start_requeued(job, 1)
    first = log_of(tmp_path, job)
    assert "ranks: 4 on 2 nodes (n0, n1), 2 on each; every tensor-parallel group is inside one node" in first
    rows = re.findall(r"^ +(\d) +(n\d) +(\d) +cpu +- +(\d) +(\d) +(\d)$", first, re.MULTILINE)
    assert rows == [(f"{r}", f"n{r // 2}", f"{r % 2}", f"{r // 2}", "0", f"{r % 2}") for r in range(4)]
    assert "; first to end: n1: task 2: Killed" in first

    step_names.append(until(cluster, tmp_path, job, 2, 3))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.start_requeued(job, 2)
    (saved,) = complete_steps(tmp_path / "checkpoints")
    assert 3 <= saved < 60
    assert f"launch: requeued: SIGUSR1 at iteration {saved} of 60; all is saved" in log_of(tmp_path, job)

    step_names.append(until(cluster, tmp_path, job, 3, 1))
    # slurmctld repeats unconfirmed signals: those for an earlier start must not reach the ranks of this one.
    assert len(set(step_names)) == 3, step_names
    lost = cluster.run("scontrol", "show", "hostnames", cluster.field(job, "NodeList")).split()[1]
    try:
        cluster.fail_node(lost, notice=True)
        cluster.start_requeued(job, 3)
        log = finished(cluster, tmp_path, job, "COMPLETED", timeout=400)
    finally:
        cluster.start_node(lost)
        cluster.wait_for_nodes()
    assert f"launch: node failure: {lost} is down" in log
    after_the_loss = log.partition(f"launch: job {job}, start 4 ")[2]
    assert f"starting at iteration {saved}," in after_the_loss.partition("launch: job")[0]
    assert log.splitlines()[-1] == "launch: done; last save: global_step60"
    assert losses(tmp_path) == uninterrupted
    assert not cluster.processes(f"SLURM_JOB_ID={job}")


@pytest.mark.slow
def test_scancel_leaves_a_complete_checkpoint_and_no_process(cluster: Cluster, data: str, tmp_path: Path) -> None:
    """Including the preflight, as users run it."""
    script = rendered(tmp_path, ROOT, configs=configure(tmp_path, data), preflight=True)
    job = cluster.submit(script, TMPDIR=str(tmp_path))
    until(cluster, tmp_path, job, 1, 2)
    assert "preflight" in log_of(tmp_path, job)
    cluster.run("scancel", job)
    finished(cluster, tmp_path, job, "CANCELLED", timeout=60)
    cluster.until(lambda: not cluster.processes(f"SLURM_JOB_ID={job}"), "the processes to end", 30)
    (saved,) = complete_steps(tmp_path / "checkpoints")
    assert saved >= 2
    assert f"launch: stopped: ended by Slurm; last save: global_step{saved}; SIGTERM" in log_of(tmp_path, job)


ALLOCATION = """\
#!/bin/bash
#SBATCH --nodes=2 --time=30 --output=neox-%j.log
exec {python} {root}/deepy.py {root}/train.py run.yml two_nodes.yml
"""


@pytest.mark.slow
def test_deepy_in_an_allocation_starts_the_ranks_by_itself(
    cluster: Cluster, data: str, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    """In a user's own batch script, deepy.py calls srun once, forwards warnings, and resumes when called again."""
    configure(tmp_path, data)
    (tmp_path / "own.sh").write_text(ALLOCATION.format(python=sys.executable, root=ROOT))
    meet = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    job = cluster.submit(tmp_path / "own.sh", f"--chdir={tmp_path}", **meet)
    # Long before the ranks handle signals: this warning must be kept for them.
    cluster.until(lambda: len(cluster.processes(f"SLURM_JOB_ID={job}", "SLURM_PROCID=3")) > 0, "the ranks", 60)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    log = finished(cluster, tmp_path, job, "FAILED", timeout=200)
    assert cluster.field(job, "ExitCode") == f"{REQUEUE}:0", log
    assert "stopped: SIGUSR1 at iteration 0 of 60; all is saved" in log
    job = cluster.submit(tmp_path / "own.sh", f"--chdir={tmp_path}", **meet)
    finished(cluster, tmp_path, job, "COMPLETED", timeout=200)
    assert losses(tmp_path) == uninterrupted
    assert not list((tmp_path / "checkpoints").glob(".neox_run_*"))
