"""Jobs of the rendered generic template: a folder, configurations for 2 nodes x 2 ranks, and the script."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml

from launch.render import main
from tests.support.configurations import keys
from tests.support.slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
CODE = ("deepy.py", "eval.py", "generate.py", "megatron", "csrc")

# Characters that shells, Slurm's --export or careless quoting lose: all must arrive.
ODD = "two  words 'single' \"double\" a,b=c (x2) [1-3] $HOME $(id) `id` \\ \t ; & | # * ? ~ {a,b} !! % \n next\n"

# A program of the project that imports no torch. PLAN says what each start of the job does.
PROGRAM = r"""
import json, os, signal, sys, time
from pathlib import Path
from megatron.launcher.rank_main import run
from megatron.supervision.failures import Stopped
from megatron.neox_arguments import ConfigError

rank, start = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
caught = []

def save(args, step):
    Path(args.save).mkdir(exist_ok=True)
    Path(args.save, "latest").write_text(f"global_step{step}")

def last_save(args):
    path = Path(args.save, "latest")
    return path.read_text() if path.exists() else None

def program(args):
    seen = {"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "file": __file__}
    seen["folders"] = [name for name, value in os.environ.items() if os.path.isdir(value)]
    Path(f"seen-{start}-{rank}.part").write_text(json.dumps(seen))
    act = os.environ["PLAN"].split(",")[start]
    if act in ("wait", "deaf"):
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda n, frame: caught.append(n))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # as StopRequest does
    Path(f"seen-{start}-{rank}.part").rename(f"seen-{start}-{rank}.json")
    while act == "wait" and not caught or act == "deaf":
        time.sleep(0.02)
    if act == "wait" and rank == 0:
        save(args, start + 1)
    while act == "wait" and last_save(args) != f"global_step{start + 1}":  # no rank leaves before all is saved
        time.sleep(0.02)
    if act == "wait":
        raise Stopped(f"{signal.Signals(caught[0]).name} at start {start}; all is saved")
    if act == "stuck":
        raise Stopped("a stop without a new save")
    if act == "lost":  # what the watchdog leaves when a rank's node does not answer
        Path(os.environ["NEOX_RUN_FOLDER"], "lost-nodes").write_text("n1\n")
        raise Stopped("rank 2 on n1 did not arrive", code=76)
    if act == "user" and rank == 1:
        raise ConfigError("the sky is too cloudy")
    if act == "bug" and rank == 3:
        raise KeyError("telescope")
    if act == "killed" and rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "killed":
        time.sleep(600)
    assert act in ("done", "user", "bug"), act

if __name__ == "__main__":
    run(program)
"""


def light_project(folder: Path) -> Path:
    """A checkout whose train.py is PROGRAM."""
    folder.mkdir()
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / "train.py").write_text(PROGRAM)
    return folder


def configure(folder: Path, name: str = "run.yml") -> list[str]:
    (folder / name).write_text(yaml.safe_dump(keys(model_parallel_size=2, save="saves", extra_save_iters=[9])))
    (folder / "machine.yml").write_text(yaml.safe_dump({"num_nodes": 2, "num_gpus": 2}))
    return [name, "machine.yml"]


def rendered(
    folder: Path, project: Path, *options: str, configs: list[str] | None = None, preflight: bool = False
) -> Path:
    """Render job.sh for `folder`; returns its path. `options` may end with `--` and overrides."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        configs = configure(folder) if configs is None else configs
        # Ranks connect through loopback, because the virtual nodes' names do not resolve.
        meet = ["--env=MASTER_ADDR=127.0.0.1", "--env=GLOO_SOCKET_IFNAME=lo"]
        words = ["generic_slurm", *configs, "--nodes=2", "--time=30", *meet, "--paths-on-nodes", "-o", "job.sh"]
        words += [] if preflight else ["--no-preflight"]
        assert main([*words, *options], project=project) == 0
    finally:
        os.chdir(before)
    return folder / "job.sh"


def log_of(folder: Path, job: str) -> str:
    path = folder / f"neox-{job}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def finished(cluster: Cluster, folder: Path, job: str, state: str, timeout: float = 90) -> str:
    """The log of a job once it has ended in this state."""
    found = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", timeout=timeout)
    log = log_of(folder, job)
    assert found == state, f"{found}\n{log}"
    return log
