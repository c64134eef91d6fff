"""The rendered generic template under a real Slurm: the tiny model on two nodes, and what a night does to it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.render import main as render
from megatron.data.indexed import IndexedWriter
from tests.models import LLAMA3_ROPE, Case
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("tokens") / "train"
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    rng = np.random.RandomState(0)
    for _ in range(60):
        writer.add(rng.randint(CASE.vocab, size=rng.randint(5, 60)))
    writer.finish()
    return str(prefix)


def configure(folder: Path, data: str, **changes: Any) -> list[str]:
    """TP2 x PP2, saving at the end alone; the machine is a file of its own."""
    folder.mkdir(exist_ok=True)
    run = dict(CASE.neox().merged) | {
        "train_data_paths": [data],
        "train_iters": 60,
        "log_interval": 1,
        "log_dir": "log",
        "save": "checkpoints",
        "extra_save_iters": [60],
        "lr_decay_style": "cosine",
        "warmup": 0.1,
        "model_parallel_size": 2,
        "pipe_parallel_size": 2,
        **changes,
    }
    run = {key: value for key, value in run.items() if value is not None}
    (folder / "run.yml").write_text(yaml.safe_dump(run))
    (folder / "two_nodes.yml").write_text(yaml.safe_dump({"num_nodes": 2, "num_gpus": 2}))
    return ["run.yml", "two_nodes.yml"]


def losses(folder: Path) -> dict[int, float]:
    path = folder / "log/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["iteration"]: r["train/lm_loss"] for r in records if "train/lm_loss" in r}


@pytest.fixture(scope="module")
def uninterrupted(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of deepy.py on this machine alone."""
    folder = tmp_path_factory.mktemp("local")
    configure(folder, data)
    command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), "run.yml", "--num_gpus", "4"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=200)
    return losses(folder)


def test_losses_are_those_of_the_local_run(
    cluster: Cluster, data: str, tmp_path: Path, uninterrupted: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = configure(tmp_path, data)
    assert render(["generic_slurm", "--nodes=2", "--time=30", "--no-preflight", "-o", "job.sh", *configs]) == 0
    start = time.monotonic()
    job = cluster.submit(tmp_path / "job.sh", TMPDIR=str(tmp_path))
    state = cluster.wait_for(job, "COMPLETED", "FAILED", timeout=200)
    log = (tmp_path / f"neox-{job}.log").read_text()
    print("SECONDS", time.monotonic() - start)
    assert state == "COMPLETED", log
    assert losses(tmp_path) == uninterrupted
