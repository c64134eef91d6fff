"""A signal to one rank, or to deepy.py: all ranks save the same step, and the same command goes on bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.discovery import complete_steps
from megatron.common.processes import children
from megatron.supervision.failures import REQUEUE
from tests.support.deepy_runs import CASE, ROOT, losses, saving_at_the_end, write_run
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed

STEPS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def command(data: str, folder: Path, **changes: Any) -> list[str]:
    """deepy.py on two pipeline stages, saving at the end alone unless `changes` say more."""
    settings = {"pipe_parallel_size": 2, "log_dir": str(folder / "log")}
    settings |= saving_at_the_end(STEPS, str(folder / "checkpoints"))
    write_run(folder / "run.yml", data, **settings | changes)
    return [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), str(folder / "run.yml")]


@pytest.fixture(scope="module")
def uninterrupted(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(data, folder), cwd=folder, check=True, capture_output=True, timeout=200)
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    return losses(folder)


def one_rank(deepy: int) -> int:
    """The process id of the second rank: deepy -> the process that forks -> ranks."""
    (supervisor,) = children(deepy)
    return sorted(children(supervisor))[-1]


def interrupt(
    words: list[str], folder: Path, whom: Callable[[int], int], number: int, steps: int = 2
) -> tuple[int, str]:
    """Run until `steps` steps are done, send the signal; returns exit code and stderr."""
    log = (folder / "stderr").open("w+")
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=log)
    try:
        deadline = time.monotonic() + 200
        while len(losses(folder)) < steps:
            assert process.poll() is None, (folder / "stderr").read_text()
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.02)
        os.kill(whom(process.pid), number)
        code = process.wait(timeout=100)
    finally:
        process.kill()
    return code, (folder / "stderr").read_text()


@pytest.mark.parametrize(
    ("whom", "number", "changes"),
    [
        pytest.param(one_rank, signal.SIGUSR1, {}, id="USR1 to one rank"),
        pytest.param(one_rank, signal.SIGTERM, {}, id="TERM to one rank"),
        pytest.param(lambda deepy: deepy, signal.SIGUSR1, {}, id="USR1 to deepy"),
        pytest.param(lambda deepy: deepy, signal.SIGINT, {}, id="ctrl-C"),
        pytest.param(lambda deepy: deepy, signal.SIGUSR1, {"launcher": "torchrun"}, id="USR1 under torchrun"),
        pytest.param(lambda deepy: deepy, signal.SIGTERM, {"launcher": "torchrun"}, id="TERM under torchrun"),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    data: str, tmp_path: Path, uninterrupted: dict[int, float], whom: Callable[[int], int], number: int, changes: dict
) -> None:
    code, said = interrupt(command(data, tmp_path, **changes), tmp_path, whom, number)
    assert code == REQUEUE, said
    done = max(losses(tmp_path))
    assert 2 <= done < STEPS
    assert complete_steps(tmp_path / "checkpoints") == [done], "all ranks saved the step they had done, and no other"
    assert said.count("stopped: SIG") == 1, said
    assert f"at iteration {done} of {STEPS}; all is saved" in said.splitlines()[-1]
    assert "Traceback" not in said
    subprocess.run(command(data, tmp_path), cwd=tmp_path, check=True, capture_output=True, timeout=200)
    assert losses(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="save at the end"),
        pytest.param(
            {"async_save": True, "checkpoint_factor": 1000, "extra_save_iters": None}, id="async, factor 1000"
        ),
    ],
)
def test_a_chain_of_short_jobs_makes_progress(
    data: str, tmp_path: Path, uninterrupted: dict[int, float], changes: dict[str, Any]
) -> None:
    """Each is ended long before the only save point; at the end nothing was done twice or left out."""
    for _ in range(2):
        before = len(losses(tmp_path))
        words = command(data, tmp_path, **changes)
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while len(losses(tmp_path)) < before + 2:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(timeout=100) == REQUEUE
        finally:
            process.kill()
        assert len(losses(tmp_path)) > before
        assert complete_steps(tmp_path / "checkpoints")[-1] == max(losses(tmp_path))
    subprocess.run(command(data, tmp_path, **changes), cwd=tmp_path, check=True, capture_output=True, timeout=200)
    assert losses(tmp_path) == uninterrupted


def test_without_a_save_folder_the_signal_just_ends_the_run(data: str, tmp_path: Path) -> None:
    words = command(data, tmp_path, save=None, extra_save_iters=None)
    code, said = interrupt(words, tmp_path, one_rank, signal.SIGUSR1)
    assert code == 128 + signal.SIGUSR1
    assert "nothing is saved, the run has no save folder" in said


def test_after_a_killed_rank_the_same_command_goes_on_from_the_last_checkpoint(
    data: str, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    """What a lost node leaves: no warning, a step cut in the middle, perhaps a save cut in the middle."""
    often = {"checkpoint_factor": 2, "keep_last_n_checkpoints": 2}
    code, said = interrupt(command(data, tmp_path, **often), tmp_path, one_rank, signal.SIGKILL, steps=6)
    assert code == 128 + signal.SIGKILL, said
    assert "rank 1 on " in said.splitlines()[-1]
    assert "was killed by SIGKILL" in said.splitlines()[-1]
    saved = complete_steps(tmp_path / "checkpoints")[-1]
    again = subprocess.run(
        command(data, tmp_path, **often), cwd=tmp_path, check=True, capture_output=True, text=True, timeout=200
    )
    assert f"starting at iteration {saved}, " in again.stdout
    assert losses(tmp_path) == uninterrupted
