"""Where a run begins, given its keys and folders: the user's word has priority, and a requeued job continues."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.checkpoint.choice import StartChoice, choose_start
from megatron.checkpoint.discovery import LATEST, find_checkpoint
from megatron.common.errors import CheckpointError
from tests.support.step_folders import write_step

pytestmark = pytest.mark.unit

JOB = {"SLURM_JOB_ID": "7"}
REQUEUED = {**JOB, "SLURM_RESTART_COUNT": "1"}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """`converted` holds step 0, `other` 500 and 600 of another run, `own` 26, 31, 36 and 500 of job 7."""
    write_step(tmp_path / "converted", 0, by="tools/convert_hf")
    for step in (500, 600):
        write_step(tmp_path / "other", step)
    for step in (26, 31, 36, 500):
        write_step(tmp_path / "own", step, job="7")
    (tmp_path / "own" / LATEST).write_text("global_step36\n")
    return tmp_path


def choose(folders: Path, env: dict[str, str] | None = None, **keys: Any) -> StartChoice | None:
    base = {"load": "converted", "save": "own", "iteration": None, "finetune": True, "no_load_optim": False}
    settings = base | {"from_scratch": False, "lora": None} | keys
    for name in ("load", "save"):
        settings[name] = settings[name] and str(folders / settings[name])
    return choose_start(SimpleNamespace(**settings), env or {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("env", "keys", "root", "iteration", "restored", "said"),
    [
        pytest.param({}, {"save": None}, "converted", None, "weights", "", id="first start"),
        pytest.param({}, {"save": "new"}, "converted", None, "weights", "", id="empty save folder"),
        pytest.param({}, {}, "own", None, "everything", "was for its first start", id="started again"),
        pytest.param({}, {"iteration": 26}, "own", 26, "everything", "goes back to iteration 26", id="back"),
        pytest.param(REQUEUED, {"iteration": 26}, "own", None, "everything", "continues", id="requeued after back"),
        pytest.param(JOB, {"iteration": 26}, "own", 26, "everything", "goes back", id="same job, not requeued"),
        pytest.param(
            {**REQUEUED, "SLURM_JOB_ID": "8"}, {"iteration": 26}, "own", 26, "everything", "back", id="other job"
        ),
        pytest.param(
            {}, {"load": "other", "iteration": 500}, "own", None, "everything", "is a step of load", id="load's step"
        ),
        pytest.param(
            {}, {"load": "own", "iteration": 500, "finetune": False}, "own", 500, "everything", "", id="own, by name"
        ),
        pytest.param({}, {"load": "own"}, "own", None, "everything", "to begin anew", id="own, finetune"),
        pytest.param(
            {}, {"load": "own", "finetune": False, "no_load_optim": True}, "own", None, "weights and position", "",
            id="own, no optimizer",
        ),
        pytest.param(
            REQUEUED, {"load": "own", "finetune": False, "no_load_optim": True}, "own", None, "everything", "requeued",
            id="own, no optimizer, requeued",
        ),
        pytest.param(
            {}, {"load": None, "from_scratch": True, "iteration": 31}, "own", 31, "everything", "goes back",
            id="from scratch, back",
        ),
    ],
)  # fmt: skip
def test_what_a_run_begins_from(
    folders: Path, env: dict, keys: dict, root: str, iteration: int | None, restored: str, said: str
) -> None:
    found = choose(folders, env, **keys)
    assert found is not None
    assert (found.root, found.iteration, found.restored) == (folders / root, iteration, restored)
    assert found.own_save is (root == "own")
    assert said in "".join(found.notes)
    assert bool(found.notes) is bool(said)


def test_a_run_from_scratch_has_no_choice(folders: Path) -> None:
    assert choose(folders, load=None, save="new", from_scratch=True) is None


def test_a_step_that_is_nowhere_is_an_error_with_those_that_are(folders: Path) -> None:
    with pytest.raises(CheckpointError, match=r"27 is not in .*own.* and not in load: .*steps 26, 31, 36, 500"):
        choose(folders, iteration=27)


def test_without_latest_nothing_starts_over(folders: Path) -> None:
    """Steps exist, and a run that began at 0 would overwrite them."""
    (folders / "own" / LATEST).unlink()
    found = choose(folders)
    assert found is not None
    assert found.root == folders / "own"
    with pytest.raises(CheckpointError, match=r"latest cannot be read .*complete in .*: steps 26, 31, 36, 500"):
        find_checkpoint(found.root)
