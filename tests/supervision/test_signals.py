"""A signal to one rank or to deepy.py: all ranks save the same step, and the same command resumes bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.discovery import complete_steps
from megatron.common.processes import children
from megatron.supervision.failures import REQUEUE
from tests.support.deepy_runs import CASE, ROOT, losses, saving_at_the_end, write_run
from tests.support.token_files import random_documents
from tests.support.waiting import wait_until

pytestmark = pytest.mark.distributed

STEPS = 200  # more than three runs complete before their signal arrives


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def command(data: str, folder: Path, **changes: Any) -> list[str]:
    """deepy.py on two pipeline stages, saving only at the end unless `changes` say otherwise."""
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
        errors = (folder / "stderr").read_text
        wait_until(lambda: len(losses(folder)) >= steps, f"{steps} steps", 200, process, errors)
        os.kill(whom(process.pid), number)
        code = process.wait(timeout=100)
    finally:
        process.kill()
    return code, (folder / "stderr").read_text()


Stop = tuple[str, Callable[[int], int], signal.Signals, dict[str, Any]]
STOPS: list[Stop] = [
    ("USR1 to one rank", one_rank, signal.SIGUSR1, {}),
    ("ctrl-C", lambda deepy: deepy, signal.SIGINT, {}),
    ("USR1 under torchrun", lambda deepy: deepy, signal.SIGUSR1, {"launcher": "torchrun"}),
]
MORE_STOPS: list[Stop] = [
    ("TERM to one rank", one_rank, signal.SIGTERM, {}),
    ("USR1 to deepy", lambda deepy: deepy, signal.SIGUSR1, {}),
    ("TERM under torchrun", lambda deepy: deepy, signal.SIGTERM, {"launcher": "torchrun"}),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stops", [STOPS, pytest.param(MORE_STOPS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_every_signal_saves_and_the_same_command_goes_on(
    data: str, tmp_path: Path, uninterrupted: dict[int, float], stops: list[Stop]
) -> None:
    """A chain of runs, each stopped long before the only save point, repeats and omits no step."""
    saved: list[int] = []
    for name, whom, number, changes in stops:
        before = len(losses(tmp_path))
        code, errors = interrupt(command(data, tmp_path, **changes), tmp_path, whom, number, steps=before + 2)
        assert code == REQUEUE, (name, errors)
        done = max(losses(tmp_path))
        assert before + 2 <= done < STEPS, name
        saved.append(done)
        assert complete_steps(tmp_path / "checkpoints") == saved, f"{name}: all ranks saved the step they had done"
        said = "Ctrl-C" if number == signal.SIGINT else number.name
        assert errors.count("stopped: ") == errors.count(f"stopped: {said} at") == 1, (name, errors)
        assert f"at iteration {done} of {STEPS}; all is saved" in errors.splitlines()[-1], name
        assert "Traceback" not in errors, name
    subprocess.run(command(data, tmp_path), cwd=tmp_path, check=True, capture_output=True, timeout=200)
    assert losses(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_chain_of_short_jobs_saves_in_the_background(
    data: str, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    changes = {"async_save": True, "checkpoint_factor": 1000, "extra_save_iters": None}
    for _ in range(2):
        before = len(losses(tmp_path))
        words = command(data, tmp_path, **changes)
        code, errors = interrupt(words, tmp_path, lambda deepy: deepy, signal.SIGUSR1, steps=before + 2)
        assert code == REQUEUE, errors
        assert len(losses(tmp_path)) > before
        assert complete_steps(tmp_path / "checkpoints")[-1] == max(losses(tmp_path))
    subprocess.run(command(data, tmp_path, **changes), cwd=tmp_path, check=True, capture_output=True, timeout=200)
    assert losses(tmp_path) == uninterrupted


def test_without_a_save_folder_the_signal_just_ends_the_run(data: str, tmp_path: Path) -> None:
    words = command(data, tmp_path, save=None, extra_save_iters=None)
    code, errors = interrupt(words, tmp_path, one_rank, signal.SIGUSR1)
    assert code == 128 + signal.SIGUSR1
    assert "nothing is saved, the run has no save folder" in errors


@pytest.mark.slow
def test_after_a_killed_rank_the_same_command_goes_on_from_the_last_checkpoint(
    data: str, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    """As after a lost node: no warning, an interrupted step, perhaps an interrupted save."""
    often = {"checkpoint_factor": 2, "keep_last_n_checkpoints": 2}
    code, errors = interrupt(command(data, tmp_path, **often), tmp_path, one_rank, signal.SIGKILL, steps=6)
    assert code == 128 + signal.SIGKILL, errors
    assert "rank 1 on " in errors.splitlines()[-1]
    assert "was killed by SIGKILL" in errors.splitlines()[-1]
    saved = complete_steps(tmp_path / "checkpoints")[-1]
    again = subprocess.run(
        command(data, tmp_path, **often), cwd=tmp_path, check=True, capture_output=True, text=True, timeout=200
    )
    assert f"starting at iteration {saved}, " in again.stdout
    assert losses(tmp_path) == uninterrupted
