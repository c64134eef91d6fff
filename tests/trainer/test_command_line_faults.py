"""Resuming, going back, damage and ownership as seen by users of deepy.py: last line and exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.owner import FolderOwner
from tests.support.deepy_runs import CASE, ROOT, write_run
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed

LAYER = "layer_02-model_00-model_states.pt"
PEAK = 1e-3


def deepy(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), str(folder / "run.yml"), *words]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps saved every two, with a warm-up of a third of a step and evaluations of zero batches."""
    folder = tmp_path_factory.mktemp("run")
    data = random_documents(folder / "data", CASE.vocab)
    write_run(
        folder / "run.yml", data, train_iters=6, save="$RUN_FOLDER/checkpoints", checkpoint_factor=2, log_dir="log",
        warmup=0.05, lr_decay_style="cosine", valid_data_paths=[data], eval_iters=0, eval_interval=3,
    )  # fmt: skip
    os.environ["RUN_FOLDER"] = str(folder)
    done = deepy(folder)
    assert done.returncode == 0, done.stderr
    assert "ETA 0:00:0" in done.stdout
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setenv("RUN_FOLDER", str(tmp_path / "run"))
    return tmp_path / "run"


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(("deepy.py: ", "  - ", "(if only", "correct the"))
    return done.stderr


def test_documented_values_and_short_warm_ups(finished: Path) -> None:
    """`eval_iters: 0` evaluates nothing, no rate is above the peak, `$VARIABLES` are expanded."""
    lines = [json.loads(line) for line in (finished / "log" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    assert len(rates) == 6
    assert 0 < max(rates) <= PEAK
    assert not [line for line in lines if any(name.startswith("validation/") for name in line)]
    assert steps(finished) == ["global_step2", "global_step4", "global_step6", "latest"]
    assert not (finished / "$RUN_FOLDER").exists()


def test_going_back_and_what_the_message_advises(run: Path) -> None:
    """`--iteration 2` goes back to 2 and sets 4 and 6 aside; without `latest` the advice is followed literally."""
    (run / "checkpoints" / "latest").unlink()
    said = refused(deepy(run))
    advice = said.partition("choose one with ")[2].partition(")")[0].replace("--iteration 6", "--iteration 2").split()
    assert advice[-2:] == ["--iteration", "2"]
    done = deepy(run, *advice, "--train_iters", "3", "--optimizer.params.lr", "2e-3")
    assert done.returncode == 0, done.stderr
    assert "starting at iteration 2" in done.stdout
    assert steps(run) == ["global_step2", "global_step3", "global_step4.set_aside", "global_step6.set_aside", "latest"]
    assert "optimizer.params.lr  0.001 -> 0.002" in done.stderr
    assert (run / "checkpoints" / "latest").read_text() == "global_step3\n"


@pytest.mark.parametrize("words", [("--rms_norm_epsilon", "1e-6"), ("--rotary_emb_base", "500000", "--dry-run")])
def test_another_model_stops_before_ranks_start(run: Path, words: tuple[str, ...]) -> None:
    said = refused(deepy(run, *words))
    assert f"{words[0][2:]}: " in said
    assert "--allow_model_changes" in said


def test_a_flipped_byte_of_a_layer_stops_the_run(run: Path) -> None:
    path = run / "checkpoints" / "global_step6" / LAYER
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{LAYER} is damaged" in refused(deepy(run, "--train_iters", "8")).splitlines()[-1]


def test_a_second_run_is_told_the_owner_of_the_folder(run: Path) -> None:
    claim = FolderOwner(run / "checkpoints")
    claim.acquire()
    assert f"belongs to another run: process {os.getpid()} on" in refused(deepy(run, "--train_iters", "8"))
    claim.release()


def test_missing_inputs_are_named_together_before_ranks_start(run: Path) -> None:
    (run / "data.bin").unlink()
    words = ["--train_data_paths", f"[{run / 'data'}]", "--vocab_file", "nowhere.json", "--save", "new"]
    said = refused(deepy(run, *words, "--load", "gone", "--from_scratch", "false"))
    for text in ("data.bin: no such file", "nowhere.json is not there", "gone is not a folder"):
        assert text in said
