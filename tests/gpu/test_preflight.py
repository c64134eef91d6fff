"""On a real GPU: the whole preflight with NCCL (RCCL), and a log written by NCCL itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.configurations import keys
from tests.support.requirements import need

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]

ROOT = Path(__file__).resolve().parents[2]

LOG = """
import os, torch, torch.distributed as dist
from megatron.preflight.transport import transport_problem, parse_rccl_log, start_rccl_log, take_rccl_log

path = start_rccl_log(os.environ)
torch.cuda.set_device(0)
dist.init_process_group("nccl", init_method="file://" + os.environ["STORE"], rank=0, world_size=1)
dist.all_reduce(torch.ones(1, device="cuda"))
torch.cuda.synchronize()
found = parse_rccl_log(take_rccl_log(path))
print(found.network, "|", transport_problem(found), flush=True)
os._exit(0)
"""


@pytest.fixture(autouse=True)
def _gpu() -> None:
    need("gpu", torch.cuda.is_available(), "torch sees no GPU")


def run(arguments: list[str], **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_one_gpu(tmp_path: Path) -> None:
    config = tmp_path / "run.yml"
    config.write_text(
        yaml.safe_dump(keys(num_gpus=1, distributed_backend="nccl", precision="bfloat16"))
    )  # its data does not exist
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    report = run([*launcher, "-m", "megatron.preflight", str(config), "--no-inputs", "--timeout", "60"])
    print(report)
    assert "transport: one node, no network is used" in report
    assert "GEMM bf16" in report
    assert "memory copy" in report
    assert "preflight: all is well" in report


def test_a_log_that_nccl_has_written(tmp_path: Path) -> None:
    """NCCL is forced to use sockets, and the preflight recognizes it."""
    said = run(["-c", LOG], NCCL_NET="Socket", STORE=str(tmp_path / "store"))
    assert said.startswith("Socket | TCP sockets"), said
