"""Ranks that are stopped, killed, hang or fail: the run ends in bounded time and names them and their node."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megatron.common.processes import children
from megatron.parallel.rank_env import PORTS, node_name
from megatron.supervision.failures import LOST
from tests.support.deepy_runs import CASE, ROOT, write_run
from tests.support.ranks import run_ranks
from tests.support.token_files import random_documents
from tests.support.waiting import wait_until

pytestmark = pytest.mark.distributed

NODE = node_name(os.environ)
BOUND_SECONDS = 90  # silence (2 s) or no progress (3 s), then the launcher's wait for ranks that do not end


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def _free_port() -> int:
    """A free port below the ephemeral ones, which other processes may take while the ranks import."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


class Run:
    """A run of two pipeline stages that does not end by itself."""

    def __init__(self, folder: Path, data: str, script: Path = ROOT / "train.py", **changes: Any) -> None:
        self.folder = folder
        settings = {
            "pipe_parallel_size": 2,
            "train_iters": 100_000,
            "log_dir": str(folder / "log"),
            "heartbeat_timeout_seconds": 2.0,
            **changes,
        }
        write_run(folder / "run.yml", data, **settings)
        self.script = script
        self.stderr = (folder / "stderr").open("w+")

    def start(self) -> None:
        """Start it by deepy.py and wait until some steps are done."""
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, str(ROOT / "deepy.py"), str(self.script), str(self.folder / "run.yml")]
        self.process = subprocess.Popen(words, cwd=self.folder, env=env, stdout=subprocess.DEVNULL, stderr=self.stderr)
        wait_until(lambda: self.metrics().count("train/lm_loss") >= 3, "three steps", 200, self.process, self.errors)

    def metrics(self) -> str:
        path = self.folder / "log/metrics.jsonl"
        return path.read_text() if path.exists() else ""

    def ranks(self) -> list[int]:
        """Process ids by rank: deepy's child supervises the ranks and started them in order."""
        (supervisor,) = children(self.process.pid)
        return sorted(children(supervisor))

    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def end(self) -> int:
        return self.process.wait(timeout=BOUND_SECONDS)

    def last_line(self) -> str:
        return [line for line in self.errors().splitlines() if "Warning" not in line and line[:1] not in (" ", "[")][-1]


@pytest.fixture
def started(data: str, tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def start(**changes: Any) -> Run:
        runs.append(Run(tmp_path, data, **changes))
        runs[-1].start()
        return runs[-1]

    yield start
    runs[0].process.kill()  # its ranks end with it
    runs[0].process.wait()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_is_named(started: Any, rank: int) -> None:
    """SIGSTOP imitates a frozen node: connections stay open, but nothing progresses."""
    run = started()
    pids = run.ranks()
    os.kill(pids[rank], signal.SIGSTOP)
    assert run.end() == LOST, run.errors()
    assert f"1 rank lost: rank {rank} on {NODE} (pipe {rank}, data 0, tensor 0): " in run.last_line()
    assert run.errors().count("stopped: ") == 1
    assert "Traceback" not in run.errors()
    stacks = run.folder / "log/stacks"
    assert [path.name for path in stacks.iterdir()] == [f"rank_{1 - rank}.txt"], "the reachable rank's"
    assert "in execute" in (stacks / f"rank_{1 - rank}.txt").read_text(), "in a step, or between two"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_job_that_is_suspended_as_a_whole_goes_on(started: Any) -> None:
    """After `scontrol suspend` and `resume`, no rank may count the suspended time as another's silence."""
    run = started()
    pids = run.ranks()
    for number, seconds in ((signal.SIGSTOP, 3 * 2.0), (signal.SIGCONT, 2 * 2.0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)  # longer than heartbeat_timeout_seconds, 2
    before = run.metrics().count("train/lm_loss")
    wait_until(
        lambda: run.metrics().count("train/lm_loss") > before,
        "a step after the resume",
        BOUND_SECONDS,
        run.process,
        run.errors,
    )


@pytest.mark.parametrize("launcher", ["fork", "torchrun"])
def test_a_killed_rank_is_named_by_the_launcher(started: Any, launcher: str) -> None:
    run = started(launcher=launcher)
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.end() == 128 + signal.SIGKILL, run.errors()
    # Under torchrun, its agent or the other rank may be the first to notice.
    noticed = ["was killed by SIGKILL"] + ["(pipe 1, data 0, tensor 0): gone"] * (launcher == "torchrun")
    assert any(f"rank 1 on {NODE} {how}" in run.last_line() for how in noticed), run.errors()
    assert "Traceback" not in run.errors()


def _plain_rank(rank: int, world_size: int, port: int, config: str, whom: int, fault: int | None) -> None:
    """A rank without our launcher's supervision; in its fifth step, rank `whom` gets a signal or fails."""
    import torch.distributed as dist

    from megatron.launcher import rank_main
    from megatron.trainer import run as trainer

    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    sys.argv = ["train.py", config]

    class Disturbed(trainer.Run):
        steps = 0

        def train_step(self) -> None:
            self.steps += 1
            if self.steps == 5 and rank == whom and fault is None:
                raise KeyError("telescope")
            if self.steps == 5 and fault is None:
                time.sleep(1000)  # like a collective of NCCL, which does not notice
            if self.steps == 5 and rank == whom and fault is not None:
                os.kill(os.getpid(), fault)
            super().train_step()

    trainer.Run = Disturbed  # type: ignore[misc]
    rank_main.run(trainer.train)


def plain_ranks(folder: Path, data: str, whom: int, fault: int | None, silence: float) -> list[tuple[int, str]]:
    """(exit code, output) of two pipeline stages, which must end without a launcher."""
    changes = {"pipe_parallel_size": 2, "train_iters": 100_000, "log_dir": str(folder / "log")}
    write_run(folder / "run.yml", data, heartbeat_timeout_seconds=silence, **changes)
    arguments = (_free_port(), str(folder / "run.yml"), whom, fault)
    grace = 1 if fault == signal.SIGSTOP else BOUND_SECONDS  # a stopped rank ends only when killed
    return run_ranks(_plain_rank, 2, *arguments, timeout=BOUND_SECONDS, grace=grace, expect_failure=True)


@pytest.mark.parametrize(("whom", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_ranks_without_a_launcher_report_the_failure(
    data: str, tmp_path: Path, whom: int, number: signal.Signals
) -> None:
    code, output = plain_ranks(tmp_path, data, whom, number, silence=2.0)[1 - whom]
    assert code == LOST, output
    (line,) = [line for line in output.splitlines() if line.startswith("stopped: ")]
    assert f"1 rank lost: rank {whom} on {NODE} (pipe {whom}, data 0, tensor 0): " in line
    assert "Traceback" not in output


def test_no_rank_waits_for_one_that_failed(data: str, tmp_path: Path) -> None:
    """The survivor is blocked in a call that does not notice the failure; it ends anyway and blames no rank."""
    results = plain_ranks(tmp_path, data, whom=1, fault=None, silence=30.0)
    output = "".join(text for _, text in results)
    assert [code for code, _ in results] == [1, 1], output
    assert output.count("KeyError: 'telescope'") == 1
    assert "lost" not in output


SCRIPT = """
import time
from megatron.launcher.rank_main import run
from megatron.trainer import run as trainer


def hang(*arguments):
    time.sleep(1000)


class Hanging(trainer.Run):
    steps = 0

    def train_step(self):
        self.steps += 1
        if self.steps == 5 and self.place.rank == 1:
            self.batches.next = hang
        super().train_step()


if __name__ == "__main__":
    trainer.Run = Hanging
    run(trainer.train)
"""


def test_a_rank_that_hangs_alive_is_named_with_its_line(started: Any, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    run = started(script=tmp_path / "train.py", heartbeat_timeout_seconds=30.0, step_timeout_minutes=0.05)
    assert run.end() == LOST, run.errors()
    line = run.last_line()
    assert "no progress for " in line
    assert f"1 rank did not arrive: rank 1 on {NODE} (pipe 1, data 0, tensor 0), in " in line
    assert " of iteration 5 at megatron/trainer/run.py:" in line
    assert "hang" in (tmp_path / "log/stacks/rank_1.txt").read_text()
    assert "all_reduce" in (tmp_path / "log/stacks/rank_0.txt").read_text()


def _timeouts(rank: int, world_size: int, spread: bool) -> dict[str, timedelta]:
    import torch
    import torch.distributed as dist

    from megatron.engine import deepspeed
    from tests.support.engine_runs import build

    if not spread:
        deepspeed.set_timeouts = lambda minutes: None
    build(CASE.neox(world_size=world_size, pipe_parallel_size=2, distributed_timeout_minutes=7), CASE)
    groups = dist.distributed_c10d._world.pg_map
    return {group.group_name: group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_the_timeout_reaches_every_group() -> None:
    for timeouts in run_ranks(_timeouts, 4, True):
        assert len(timeouts) > 10, "DeepSpeed's and megatron-core's groups"
        assert set(timeouts.values()) == {timedelta(minutes=7)}


def test_the_timeout_would_not_reach_every_group_by_itself() -> None:
    """The reason for `set_timeouts`: DeepSpeed's groups have torch's default timeout, 30 minutes with gloo."""
    for timeouts in run_ranks(_timeouts, 4, False):
        assert timedelta(minutes=30) in timeouts.values()
