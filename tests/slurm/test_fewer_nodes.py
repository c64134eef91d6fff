"""Nodes are missing: the same job continues with the remaining nodes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.checkpoint.discovery import complete_steps
from megatron.checkpoint.manifest import read_manifest
from tests.support.deepy_runs import CASE, ROOT, losses, saving_at_the_end, write_run
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import finished, rendered
from tests.support.token_files import random_documents

pytestmark = pytest.mark.slurm

GUIDE = (ROOT / "docs/launching.md").read_text().partition("## When nodes are missing")[2].partition("\n## ")[0]
STEPS = 60
BATCH = 12  # divisible by four replicas and by three


def configure(folder: Path, data: str) -> list[str]:
    """One rank on each of four nodes, DP4; saved every five steps."""
    settings: dict[str, Any] = {"log_dir": "log", "gradient_accumulation_steps": None, "checkpoint_factor": 5}
    settings |= {"train_batch_size": BATCH, "train_micro_batch_size_per_gpu": 1}
    write_run(folder / "run.yml", data, **(saving_at_the_end(STEPS, "checkpoints") | settings))
    (folder / "four_nodes.yml").write_text(yaml.safe_dump({"num_nodes": 4, "num_gpus": 1}))
    return ["run.yml", "four_nodes.yml"]


@pytest.mark.timeout(600)
def test_a_job_of_four_nodes_loses_one_and_goes_on_with_three(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)
    script = rendered(tmp_path, ROOT, "--nodes=4", configs=configure(tmp_path, data))
    job = cluster.submit(script, TMPDIR=str(tmp_path))
    cluster.until(lambda: bool(complete_steps(tmp_path / "checkpoints")), "a checkpoint", 200)
    lost = cluster.run("scontrol", "show", "hostnames", cluster.field(job, "NodeList")).split()[3]
    try:
        cluster.fail_node(lost, notice=True)
        cluster.until(lambda: cluster.state(job) == "PENDING", f"job {job} back in the queue", 60)
        cluster.run("scancel", job)  # the fourth node does not come back
        cluster.until(lambda: cluster.state(job) == "CANCELLED", "the old job to end", 60)
        saved = complete_steps(tmp_path / "checkpoints")[-1]
        assert saved < STEPS
        assert read_manifest(tmp_path / f"checkpoints/global_step{saved}").provenance["layout"]["dp"] == 4

        (command,) = re.findall(r"^sbatch .*--nodes=\d+ job\.sh$", GUIDE, re.MULTILINE)
        job = cluster.submit(script, *command.split()[1:-1], TMPDIR=str(tmp_path))
        log = finished(cluster, tmp_path, job, "COMPLETED", timeout=300)
    finally:
        cluster.start_node(lost)
        cluster.wait_for_nodes()
    assert f"launch: nodes: 3, rendered for 4\nlaunch: job {job}, start 1 on " in log
    assert lost not in log.partition("last save:")[0]
    assert "saved at TP1 PP1 DP4, running at TP1 PP1 DP3" in log
    assert f"batch: {BATCH} = micro-batch 1 x accumulation 4 x data parallel 3" in log
    assert f"starting at iteration {saved}, {saved * BATCH} samples consumed" in log
    assert read_manifest(tmp_path / f"checkpoints/global_step{STEPS}").provenance["layout"]["dp"] == 3

    alone = tmp_path_factory.mktemp("alone")
    configure(alone, data)
    command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), "run.yml", "--num_gpus", "4"]
    subprocess.run(command, cwd=alone, check=True, capture_output=True, timeout=200)
    found, expected = losses(tmp_path), losses(alone)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-6)
