"""Background saves that fail: write errors, lack of memory, slow ranks, `kill -9`."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import background, save
from megatron.checkpoint.background import BackgroundSaver
from megatron.checkpoint.discovery import LATEST, clean_leftovers, complete_steps, find_checkpoint, tag_name
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.rank_files import HostCopies
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.verify import verify_checkpoint
from megatron.common.errors import CheckpointError
from tests.support.checkpoints import FULL_DISKS, StandingEngine, standing_args
from tests.support.kills import killed_at
from tests.support.log_lines import LogLines
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

GOES_ON = "The run goes on without this checkpoint"
# The fast suite takes every fifth of about 70 file operations; the two tests do not take the same ones.
every_operation = pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])


class Standing:
    """A background saver of the stand-in engine, with its log on this rank."""

    def __init__(self, rank: int, world_size: int, root: str, **keys: Any) -> None:
        log = LogLines()
        self.warnings, self.lines = log.warnings, log.lines
        args = standing_args(root, **keys)
        self.saver = BackgroundSaver(StandingEngine(args, rank, world_size), args, {})

    def begin(self, step: int) -> None:
        self.saver.begin(TrainState(step, 8 * step, hf_files={"config.json": b"{}"}))

    def whole(self, step: int) -> None:
        self.begin(step)
        self.saver.wait()


def _save_on_a_full_disk(rank: int, world_size: int, root: str, full_rank: int, limit: int) -> Any:
    """The second of three saves does not fit on one rank; nothing raises."""
    standing = Standing(rank, world_size, root)
    standing.whole(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    standing.whole(2)
    after, completed = sorted(path.name for path in Path(root).iterdir()), standing.saver.completed
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()  # no rank starts the next save before all have checked
    standing.whole(3)
    assert standing.saver.completed == 3
    return standing.warnings, after, completed


@pytest.mark.parametrize(("full_rank", "limit", "file"), FULL_DISKS)
def test_a_disk_that_fills_on_one_rank_is_reported_and_the_next_save_tries_again(
    tmp_path: Path, full_rank: int, limit: int, file: str
) -> None:
    results = run_ranks(_save_on_a_full_disk, 4, str(tmp_path), full_rank, limit)
    message = (
        f"saving {tmp_path}/global_step2 failed. rank {full_rank}: {tmp_path}/global_step2.tmp/{file}: File too large. "
        f"{GOES_ON} (the last one is of iteration 1); the next save tries again"
    )
    assert [warnings for warnings, _, _ in results] == [[message]] * 4
    assert all(after == ["global_step1", LATEST] for _, after, _ in results), "the partial folder stayed"
    assert [completed for *_, completed in results] == [1] * 4
    assert find_checkpoint(tmp_path) == tmp_path / "global_step3"
    assert verify_checkpoint(tmp_path / "global_step1") == verify_checkpoint(tmp_path / "global_step3") == []


def _save_on_a_small_disk(rank: int, world_size: int, root: str) -> Any:
    """Save until the disk is full, make room, save again."""
    standing = Standing(rank, world_size, root)
    step = 0
    while not standing.warnings:
        step += 1
        standing.whole(step)
    if rank == 0:
        shutil.rmtree(Path(root, tag_name(1)))
    torch.distributed.barrier()
    standing.whole(step + 1)
    return standing.warnings, step, standing.saver.completed


def test_a_file_system_without_space_keeps_the_last_checkpoint_and_the_run(small_disk: Path) -> None:
    results = run_ranks(_save_on_a_small_disk, 2, str(small_disk))
    assert results[0] == results[1]
    warnings, failed, completed = results[0]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert f"the last one is of iteration {failed - 1}" in warnings[0]
    assert completed == failed + 1
    assert complete_steps(small_disk) == [*range(2, failed), failed + 1]
    assert verify_checkpoint(find_checkpoint(small_disk)) == []


def _fail_once(rank: int, world_size: int, root: str, where: str) -> list[str]:
    standing = Standing(rank, world_size, root)
    standing.whole(1)
    if where == "manifest":

        def full(folder: Path, manifest: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / "manifest.json"))

        original, save.write_manifest = save.write_manifest, full
        standing.whole(2)
        save.write_manifest = original
    else:
        obstacle = Path(root, "global_step2.tmp")
        if rank == 0:
            obstacle.write_text("a file where the folder should be")
        standing.whole(2)
        if rank == 0:
            obstacle.unlink()
    torch.distributed.barrier()
    standing.whole(3)
    return standing.warnings


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("manifest", "rank 0: {root}/global_step2.tmp/manifest.json: Input/output error"),
        ("folder", "rank 0: {root}/global_step2.tmp: File exists"),
    ],
)
def test_a_failure_of_rank_0_alone_is_reported_too(tmp_path: Path, where: str, reason: str) -> None:
    warnings = run_ranks(_fail_once, 2, str(tmp_path), where)
    expected = f"saving {tmp_path}/global_step2 failed. {reason.format(root=tmp_path)}. {GOES_ON}"
    assert all(len(lines) == 1 and lines[0].startswith(expected) for lines in warnings), warnings
    assert complete_steps(tmp_path) == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "global_step3", LATEST]


def _without_memory(rank: int, world_size: int, root: str) -> Any:
    """Rank 1 cannot allocate its copies, at the start and then at the first save."""
    standing = Standing(rank, world_size, root)
    snapshot = HostCopies.snapshot

    def no_room(copies: HostCopies, contents: Any) -> Any:
        raise RuntimeError("cannot allocate memory")

    if rank == 1:
        HostCopies.snapshot = no_room  # type: ignore[method-assign]
    with pytest.raises(CheckpointError) as refused:
        standing.saver.prepare()
    standing.whole(1)
    HostCopies.snapshot = snapshot  # type: ignore[method-assign]
    standing.whole(2)
    return str(refused.value), standing.warnings


def test_a_rank_without_memory_is_named_before_the_first_step(tmp_path: Path) -> None:
    results = run_ranks(_without_memory, 2, str(tmp_path))
    assert results[0] == results[1]
    refused, warnings = results[0]
    reason = "failed. rank 1: RuntimeError: cannot allocate memory"
    assert refused == f"async_save: making room for copies in host memory {reason}"
    assert len(warnings) == 1
    assert warnings[0].startswith(f"saving {tmp_path}/global_step1 {reason}. {GOES_ON} (there is none yet)")
    assert complete_steps(tmp_path) == [2]


def _wait_for_a_slow_rank(rank: int, world_size: int, root: str) -> Any:
    """Rank 1 writes only after rank 0 has asked a few times; meanwhile the next save is due."""
    standing = Standing(rank, world_size, root, keep_last_n_checkpoints=1)
    background.QUESTIONS_A_REPORT = 3
    reported = threading.Event()
    write = background.CheckpointWriter.write
    where = standing.saver.ranks.where

    def reporting(true: bool) -> str:
        reported.set()
        return where(true)

    def slow(writer: Any, contents: Any) -> None:
        assert rank != 1 or reported.wait(60)
        write(writer, contents)

    standing.saver.ranks.where = reporting  # type: ignore[method-assign]
    background.CheckpointWriter.write = slow  # type: ignore[method-assign]
    standing.begin(1)
    if rank == 0:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
    standing.begin(2)
    standing.saver.wait()
    return standing.lines


def test_a_save_that_is_due_waits_for_the_one_in_flight_and_names_who_is_slow(tmp_path: Path) -> None:
    lines = run_ranks(_wait_for_a_slow_rank, 2, str(tmp_path))[0]
    assert lines[0] == "waiting for global_step1: rank 1 still writing"
    lines = [line for line in lines if not line.startswith("waiting")]
    assert lines[0].startswith(f"saved {tmp_path}/global_step1: training waited")
    assert re.match(r"iteration 2: training waited \d+\.\d\d s until global_step1 was written", lines[1])
    assert lines[2].startswith(f"saved {tmp_path}/global_step2: ")
    assert lines[3] == f"removed {tmp_path}/global_step1 (keep_last_n_checkpoints: 1)"
    assert len(lines) == 4


def _save_until_killed(rank: int, world_size: int, root: str, delay: float) -> None:
    """As in the test of synchronous saves: save every step twice, and remove optimizer states of old ones."""
    standing = Standing(rank, world_size, root, keep_last_n_checkpoints=2, keep_optimizer_last_n=1)
    standing.whole(1)
    if rank == 0:
        Path(root, "reported").write_text("1")
    if os.fork() == 0:  # a child that kills this rank, unaffected by its threads
        time.sleep(delay)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    for step in range(2, 1000):
        for _ in range(2):
            standing.begin(step)
            while standing.saver.in_flight:
                standing.saver.poll()
                if rank == 0:
                    Path(root, "reported").write_text(str(standing.saver.completed))


def test_killed_at_ten_random_moments_what_was_reported_is_there(tmp_path: Path) -> None:
    moments = random.Random(21)
    partial = 0
    for attempt in range(10):
        root = tmp_path / str(attempt)
        delay = moments.uniform(0.0, 0.3)
        outcome = run_ranks(_save_until_killed, 2, str(root), delay, expect_failure=True)
        assert [code for code, _ in outcome] == [-signal.SIGKILL] * 2, outcome
        partial += any(path.name.endswith(".tmp") for path in root.iterdir())
        folder = find_checkpoint(root)
        problems = [p for p in verify_checkpoint(folder) if "is not in the manifest" not in p]
        assert problems == [], f"killed after {delay:.3f} s"
        manifest = read_manifest(folder)
        assert manifest.provenance["iteration"] >= int((root / "reported").read_text() or 1)
        clean_leftovers(root)
        assert read_manifest(find_checkpoint(root)) == manifest
        assert not [path.name for path in root.iterdir() if path.name.endswith((".tmp", ".replaced"))]
    assert partial, "no kill fell into a save"


def alone(root: Path, **keys: Any) -> Standing:
    """A saver on the only rank of its process."""
    torch.set_num_threads(1)
    background.PAUSE_SECONDS = 0.001
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}.store", rank=0, world_size=1)
    return Standing(0, 1, str(root), **keys)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A run folder with the checkpoints of steps 1 and 2."""
    root = tmp_path / "before"

    def work() -> None:
        standing = alone(root, keep_optimizer_last_n=1)
        for step in (1, 2):
            standing.whole(step)

    assert not killed_at(1000, work)
    return root


@every_operation
def test_killed_at_any_operation_the_last_complete_one_is_found(tmp_path: Path, before: Path, stride: int) -> None:
    """Background saves of a new and a replaced step, with retention, are killed before file operations in turn."""

    def work(root: Path) -> None:
        standing = alone(root, keep_last_n_checkpoints=2, keep_optimizer_last_n=1)
        for _ in range(2):
            standing.whole(3)
        assert standing.saver.completed == 3
        assert standing.warnings == []

    for operation in range(1, 1000, stride):
        root = tmp_path / str(operation)
        shutil.copytree(before, root)
        killed = killed_at(operation, lambda root=root: work(root))
        found = find_checkpoint(root)
        problems = [p for p in verify_checkpoint(found) if "is not in the manifest" not in p]
        assert problems == [], f"killed before operation {operation}"
        assert found.name.startswith(("global_step2", "global_step3"))
        manifest = read_manifest(found)
        clean_leftovers(root)
        assert read_manifest(find_checkpoint(root)) == manifest
        assert not [path.name for path in root.iterdir() if path.name.endswith((".tmp", ".replaced"))]
        if not killed:
            assert operation > 60, "the operations were not counted"
            assert complete_steps(root) == [2, 3]
            return
        shutil.rmtree(root)
    pytest.fail("the work never came to its end")


@every_operation
def test_an_error_at_any_operation_costs_one_save_at_most(tmp_path: Path, before: Path, stride: int) -> None:
    """One file operation fails, each time another: the run continues, the next save is complete, no file is left."""

    hit: list[str] = []

    def broken() -> None:
        if not hit:
            hit.append("Input/output error")
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def work(root: Path) -> None:
        standing = alone(root, keep_last_n_checkpoints=2, keep_optimizer_last_n=1)
        for _ in range(2):
            standing.whole(3)
        (root / "said").write_text(json.dumps({"hit": bool(hit), "warnings": standing.warnings}))
        hit.append("no more")
        standing.whole(4)
        assert standing.saver.completed == 4

    reported = 0
    for operation in range(min(3, stride), 1000, stride):
        root = tmp_path / str(operation)
        shutil.copytree(before, root)
        killed_at(operation, lambda root=root: work(root), broken)
        said = json.loads((root / "said").read_text())
        assert len(said["warnings"]) <= 1
        for warning in said["warnings"]:
            assert "Input/output error" in warning
            assert GOES_ON in warning or warning.startswith("an old checkpoint could not be removed")
            reported += GOES_ON in warning
        assert complete_steps(root) == [3, 4], f"operation {operation}"
        assert verify_checkpoint(find_checkpoint(root, 3)) == verify_checkpoint(find_checkpoint(root)) == []
        assert {path.name for path in root.iterdir()} == {"global_step3", "global_step4", LATEST, "said"}
        shutil.rmtree(root)
        if not said["hit"]:
            assert reported * stride > 40
            return
    pytest.fail("the work never came to its end")
