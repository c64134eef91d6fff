"""Whole runs with background saves: killed, stopped by a signal, and with an unreliable disk."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from megatron.checkpoint import background, save
from megatron.checkpoint.discovery import complete_steps, find_checkpoint, tag_name
from megatron.checkpoint.verify import verify_checkpoint
from megatron.engine.batches import StepBatch
from megatron.engine.protocol import StepResult
from megatron.supervision.failures import Stopped
from megatron.supervision.signals import StopRequest
from tests.support.checkpoint_runs import Gate, file_differences
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case
from tests.support.token_files import random_documents

if TYPE_CHECKING:
    from megatron.trainer.run import Run

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
KILLS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def keys(data: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "pipe_parallel_size": 2,
        "train_data_paths": [data],
        "log_interval": 1,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "async_save": True,
        "checkpoint_factor": 2,
        "lr_decay_style": "cosine",
        "warmup": 0.1,
        "gradient_accumulation_steps": 2,
        **changes,
    }


def after_each_step(what: Callable[[int], None]) -> type[Run]:
    """A run that calls `what(iteration)` after each step, before its save."""
    from megatron.trainer.run import Run

    class Disturbed(Run):
        def train_step(self) -> None:
            super().train_step()
            what(self.state.iteration)

    return Disturbed


def _run(
    rank: int, world_size: int, run_keys: dict[str, Any], run: type[Run] | None = None, stop: StopRequest | None = None
) -> None:
    random.seed(rank)  # a run from scratch has the same random states every time
    np.random.seed(rank)
    run_case(CASE, world_size, run_keys, run, stop)


def _run_until_killed(rank: int, world_size: int, run_keys: dict[str, Any], steps: int, delay: float) -> None:
    """Send SIGKILL `delay` seconds after the `steps`-th step since this start."""
    done: list[int] = []

    def start_killer(iteration: int) -> None:
        done.append(iteration)
        if len(done) == steps and os.fork() == 0:  # in a child, unaffected by the rank's threads
            time.sleep(delay)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)

    _run(rank, world_size, run_keys, after_each_step(start_killer))


def test_ten_kills_lose_nothing_that_was_reported_and_change_nothing(data: str, tmp_path: Path) -> None:
    """A run killed ten times has the same losses and bit for bit the same last checkpoint as an uninterrupted one."""
    steps = 130  # ten kills after at most twelve steps each leave some to go
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    run_ranks(_run, 2, keys(data, whole, train_iters=steps, checkpoint_factor=steps))
    moments, in_flight = random.Random(22), 0
    run_keys = keys(data, chain, train_iters=steps, keep_last_n_checkpoints=2)
    for _ in range(KILLS):
        moment = moments.randint(1, 12), moments.uniform(0.0, 0.03)
        outcome = run_ranks(_run_until_killed, 2, run_keys, *moment, expect_failure=True)
        codes = {code for code, _ in outcome}
        assert -signal.SIGKILL in codes, outcome
        assert 0 not in codes, outcome  # one may have noticed the other's death before its own
        reported = [int(step) for step in re.findall(r"^saved \S+/global_step(\d+): ", outcome[0][1], re.MULTILINE)]
        in_flight += any(path.name.endswith(".tmp") for path in (chain / "checkpoints").iterdir())
        if reported:
            latest = find_checkpoint(chain / "checkpoints")
            assert int(latest.name.removeprefix("global_step")) >= reported[-1]
            assert verify_checkpoint(latest) == []
    assert in_flight, "no kill fell into a save"
    run_ranks(_run, 2, run_keys)
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate"):
        assert metrics(chain, key) == metrics(whole, key)
    assert file_differences(*(folder / "checkpoints" / tag_name(steps) for folder in (whole, chain))) == []


def writing_is_over() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def _run_on_a_failing_disk(rank: int, world_size: int, run_keys: dict[str, Any]) -> None:
    """Rank 1 cannot write during the saves of steps 4 and 8."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def now_and_then(iteration: int) -> None:
        writing_is_over()
        if rank == 1:
            full = iteration in (4, 8)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else limits[0], limits[1]))

    _run(rank, world_size, run_keys, after_each_step(now_and_then))


def test_a_failed_save_is_reported_in_the_middle_and_an_error_at_the_end(data: str, tmp_path: Path) -> None:
    run_keys = keys(data, tmp_path, train_iters=8)
    outcome = run_ranks(_run_on_a_failing_disk, 2, run_keys, expect_failure=True)
    checkpoints = tmp_path / "checkpoints"
    assert [code for code, _ in outcome] == [1, 1]
    failed = rf"CheckpointError: saving {checkpoints}/global_step8 failed. rank 1: .*File too large"
    assert re.search(failed, outcome[0][1])  # rank 1 cannot even write its log
    assert f"warning: saving {checkpoints}/global_step4 failed. rank 1: " in outcome[0][1]
    assert "the last one is of iteration 2" in outcome[0][1]
    assert sorted(metrics(tmp_path, "train/lm_loss")) == list(range(1, 9)), "the run did not go on"
    assert complete_steps(checkpoints) == [2, 6]
    assert find_checkpoint(checkpoints).name == "global_step6"
    assert not list(checkpoints.glob("*.tmp"))


def _run_until_stopped(rank: int, world_size: int, run_keys: dict[str, Any], at: int, failing: bool) -> str:
    """Send SIGUSR1 to rank 1 in step `at`; a save in flight is not written before the run waits for it."""
    from megatron.trainer.saves import Saves

    gate, now, write = Gate(), Saves.now, background.CheckpointWriter.write
    stop = StopRequest()

    def open_gate(saves: Any, state: Any) -> None:
        gate.open()
        now(saves, state)

    def fail(writer: Any, contents: Any) -> None:
        background.CheckpointWriter.write = save.CheckpointWriter.write = write
        write(writer, contents)
        raise OSError(5, "Input/output error", "a file")

    def signal_rank(iteration: int) -> None:
        if iteration == at and rank == 1:
            stop.received = signal.SIGUSR1

    Saves.now = open_gate  # type: ignore[method-assign]
    if failing and rank == 1:
        background.CheckpointWriter.write = fail  # type: ignore[method-assign]
    try:
        _run(rank, world_size, run_keys, after_each_step(signal_rank), stop)
    except Stopped as stopped:
        return str(stopped)
    return ""


@pytest.mark.parametrize(
    ("at", "failing", "complete"),
    [
        pytest.param(4, False, [3, 4], id="another step in flight"),
        pytest.param(3, False, [3], id="this step in flight"),
        pytest.param(3, True, [3], id="this step in flight fails"),
        pytest.param(4, True, [4], id="another step in flight fails"),
        pytest.param(99, False, [3, 5], id="the end of the run"),
    ],
)
def test_a_signal_and_the_end_wait_for_what_is_in_flight(
    data: str, tmp_path: Path, at: int, failing: bool, complete: list[int]
) -> None:
    run_keys = keys(data, tmp_path, checkpoint_factor=3, train_iters=5)
    results = run_ranks(_run_until_stopped, 2, run_keys, at, failing)
    stopped = f"SIGUSR1 at iteration {at} of 5; all is saved, the same command goes on from there"
    assert results == [stopped if at < 5 else ""] * 2
    checkpoints = tmp_path / "checkpoints"
    assert complete_steps(checkpoints) == complete
    assert find_checkpoint(checkpoints).name == tag_name(complete[-1])
    assert all(verify_checkpoint(checkpoints / tag_name(step)) == [] for step in complete)


def _run_until_broken(rank: int, world_size: int, run_keys: dict[str, Any]) -> None:
    """The gradient norm of step 3 is NaN while the save of step 2 is not yet written."""
    from megatron.trainer.run import Run
    from megatron.trainer.saves import Saves

    gate, finish = Gate(), Saves.finish

    def open_gate(saves: Any) -> None:
        gate.open()
        finish(saves)

    Saves.finish = open_gate  # type: ignore[method-assign]

    class Broken(Run):
        def judge(self, result: StepResult, iteration: int, samples: tuple[int, int], batch: StepBatch) -> None:
            broken = replace(result, grad_norm=float("nan")) if iteration == 3 else result
            super().judge(broken, iteration, samples, batch)

    _run(rank, world_size, run_keys, Broken)


def test_a_run_that_stops_for_its_loss_keeps_what_was_being_written(data: str, tmp_path: Path) -> None:
    outcome = run_ranks(_run_until_broken, 2, keys(data, tmp_path, train_iters=5), expect_failure=True)
    assert all(code == 1 and "SuspiciousLossError: iteration 3" in output for code, output in outcome)
    assert complete_steps(tmp_path / "checkpoints") == [2]
