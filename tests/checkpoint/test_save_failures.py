"""Saves that fail: killed ranks, a full disk on one rank."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.discovery import LATEST, clean_leftovers, find_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.save import prepare_save, save_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.verify import verify_checkpoint
from megatron.common.errors import CheckpointError
from tests.support.checkpoints import FULL_DISKS, StandingEngine, standing_args
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def save_step(engine: Any, args: Any, step: int) -> Path:
    state = TrainState(step, 8 * step, hf_files={"config.json": b"{}"})
    return save_checkpoint(engine, args, state, data_fingerprints={})


def _save_until_killed(rank: int, world_size: int, root: str, delay: float) -> None:
    """Save every step twice, so that replacement is interrupted, too, and remove optimizer states of old ones."""
    args = standing_args(root, keep_last_n_checkpoints=2, keep_optimizer_last_n=1)
    engine = StandingEngine(args, rank, world_size)
    save_step(engine, args, 1)
    if rank == 0:
        Path(root, "first").touch()
    if os.fork() == 0:  # a child that kills this rank, unaffected by its threads
        time.sleep(delay)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    for step in range(2, 1000):
        for _ in range(2):
            save_step(engine, args, step)
            if rank == 0:
                Path(root, "returned").write_text(str(step))


def test_killed_at_ten_random_moments_of_a_save(tmp_path: Path) -> None:
    """Both ranks get SIGKILL during the same saves; the next start finds a complete checkpoint, no older than the last
    save that returned."""
    moments = random.Random(20)
    for attempt in range(10):
        root = tmp_path / str(attempt)
        delay = moments.uniform(0.0, 0.3)
        outcome = run_ranks(_save_until_killed, 2, str(root), delay, expect_failure=True)
        codes = [code for code, _ in outcome]
        # The rank that is killed second may have failed before, because the first one is gone.
        assert -signal.SIGKILL in codes, outcome
        assert set(codes) <= {-signal.SIGKILL, 1}, outcome
        assert (root / "first").exists()
        returned = (root / "returned").read_text() if (root / "returned").exists() else ""
        folder = find_checkpoint(root)
        problems = [p for p in verify_checkpoint(folder) if "is not in the manifest" not in p]
        assert problems == [], f"killed after {delay:.3f} s"
        manifest = read_manifest(folder)
        assert manifest.provenance["iteration"] >= int(returned or 1)
        clean_leftovers(root)
        assert read_manifest(find_checkpoint(root)) == manifest
        assert not [path.name for path in root.iterdir() if path.name.endswith((".tmp", ".replaced"))]


def _save_on_a_full_disk(rank: int, world_size: int, root: str, full_rank: int, limit: int) -> Any:
    """Fail with exit code 1 and the message, like the entry points; with room, the same ranks save again."""
    args = standing_args(root)
    engine = StandingEngine(args, rank, world_size)
    save_step(engine, args, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        save_step(engine, args, 2)
        message = ""
    except CheckpointError as error:
        message = str(error)
    after = sorted(path.name for path in Path(root).iterdir())
    torch.distributed.barrier()  # no rank starts the next save before all have checked
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save_step(engine, args, 3)
    return message, after


@pytest.mark.parametrize(("full_rank", "limit", "file"), FULL_DISKS)
def test_a_disk_that_fills_on_one_rank_stops_all_with_one_message(
    tmp_path: Path, full_rank: int, limit: int, file: str
) -> None:
    results = run_ranks(_save_on_a_full_disk, 4, str(tmp_path), full_rank, limit)
    message = (
        f"saving {tmp_path}/global_step2 failed. rank {full_rank}: {tmp_path}/global_step2.tmp/{file}: File too large"
    )
    assert [m for m, _ in results] == [message] * 4
    assert all(after == ["global_step1", LATEST] for _, after in results), "the partial folder stayed"
    assert verify_checkpoint(tmp_path / "global_step1") == []
    assert find_checkpoint(tmp_path) == tmp_path / "global_step3"
    assert verify_checkpoint(tmp_path / "global_step3") == []


def _save_on_a_small_disk(rank: int, world_size: int, root: str) -> str:
    args = standing_args(root)
    engine = StandingEngine(args, rank, world_size)
    try:
        for step in range(1, 100):
            save_step(engine, args, step)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_file_system_without_space_keeps_the_last_checkpoint(small_disk: Path) -> None:
    messages = run_ranks(_save_on_a_small_disk, 2, str(small_disk))
    assert messages[0] == messages[1]
    assert "No space left on device" in messages[0]
    folder = find_checkpoint(small_disk)
    assert verify_checkpoint(folder) == []
    assert not [path.name for path in small_disk.iterdir() if path.name.endswith(".tmp")]


def _prepare(rank: int, world_size: int, folders: list[str]) -> list[str]:
    messages = []
    for folder in folders:
        args = standing_args(folder)
        try:
            prepare_save(StandingEngine(args, rank, world_size), args)
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_a_save_folder_that_cannot_be_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run/global_step3.tmp").mkdir(parents=True)
    by_rank = run_ranks(_prepare, 2, [str(tmp_path / "run"), f"{tmp_path}/new/run/", str(tmp_path / "file/run")])
    assert by_rank[0] == by_rank[1]
    assert by_rank[0][:2] == ["", ""]
    assert "Not a directory" in by_rank[0][2]
    assert list((tmp_path / "run").iterdir()) == []
