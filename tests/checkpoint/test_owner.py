"""A save folder belongs to one run: its owner is named, and the claim of a killed run blocks no other."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.checkpoint import owner
from megatron.checkpoint.owner import OWNER, FolderOwner, FolderTakenError, Owner, check_ownership, owning
from megatron.common.errors import CheckpointError

pytestmark = pytest.mark.unit

SQUEUE = """#!/bin/sh
case "$*" in *--jobs=41*) echo RUNNING;; *--jobs=42*) echo "NODE_FAIL";;
*--jobs=43*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
*) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1;; esac
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text(SQUEUE)
    (folder / "squeue").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def left_by(folder: Path, **changes: object) -> Owner:
    """Write the claim of another process."""
    folder.mkdir(exist_ok=True)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    holder = replace(Owner.this_process({}), pid=int(gone.stdout), began="1", **changes)  # type: ignore[arg-type]
    (folder / OWNER).write_text(holder.to_json())
    return holder


def test_a_folder_is_owned_and_given_back(tmp_path: Path) -> None:
    with owning(tmp_path / "run") as line:
        assert line is None
        assert (tmp_path / "run" / OWNER).exists()
        check_ownership(tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


def test_a_living_owner_is_named(tmp_path: Path) -> None:
    with owning(tmp_path), pytest.raises(FolderTakenError) as caught:
        FolderOwner(tmp_path).acquire()
    assert f"process {os.getpid()} on " in str(caught.value)
    assert "--save" in str(caught.value)


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path: Path) -> None:
    left_by(tmp_path)
    holder = replace(Owner.this_process({}), began="1")  # this pid, but of a process with another start time
    (tmp_path / OWNER).write_text(holder.to_json())
    assert "this process has ended" in str(FolderOwner(tmp_path).acquire())


@pytest.mark.parametrize(
    ("holder", "own_job", "verdict"),
    [
        pytest.param({}, None, "this process has ended", id="dead here"),
        pytest.param({"machine": "elsewhere", "job": "41"}, "41", "the same job, started again", id="requeued"),
        pytest.param({"machine": "elsewhere", "job": "42"}, "50", "its job is NODE_FAIL", id="Slurm: failed"),
        pytest.param({"machine": "elsewhere", "job": "43"}, "50", "its job is COMPLETED", id="Slurm: forgotten"),
        pytest.param({"machine": "elsewhere", "job": "41"}, "50", None, id="Slurm: runs"),
        pytest.param({"machine": "elsewhere", "job": "44"}, "50", None, id="Slurm: no answer"),
        pytest.param({"machine": "elsewhere"}, "50", None, id="elsewhere, no job"),
    ],
)
def test_who_may_take_over(tmp_path: Path, slurm: None, holder: dict, own_job: str | None, verdict: str | None) -> None:
    left = left_by(tmp_path / "run", **holder)
    claim = FolderOwner(tmp_path / "run", Owner.this_process({"SLURM_JOB_ID": own_job} if own_job else {}))
    if verdict is None:
        with pytest.raises(FolderTakenError, match=f"process {left.pid} on {left.host}"):
            claim.acquire()
        assert Owner.from_json((tmp_path / "run" / OWNER).read_text()) == left
    else:
        assert verdict in str(claim.acquire())
        claim.check()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\x00\xff"])
def test_a_claim_that_cannot_be_read_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / OWNER).write_text(text)
    assert "could not be read" in str(FolderOwner(tmp_path).acquire())


def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path) -> None:
    for round_ in range(20):
        folder = tmp_path / str(round_)
        left_by(folder)
        start, won = threading.Barrier(4), []

        def take(folder: Path = folder, start: threading.Barrier = start, won: list = won) -> None:
            claim = FolderOwner(folder)
            start.wait()
            try:
                claim.acquire()
            except FolderTakenError:
                return
            won.append(claim)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].check()
        assert [path.name for path in folder.iterdir()] == [OWNER]


def test_a_run_that_lost_its_folder_does_not_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owning(tmp_path):
        (tmp_path / OWNER).unlink()
        with pytest.raises(CheckpointError, match="is gone"):
            check_ownership(tmp_path)
        monkeypatch.setattr(owner, "_held", {})
        other = FolderOwner(tmp_path)
        other.acquire()
    assert (tmp_path / OWNER).exists(), "another run's claim is left alone"
