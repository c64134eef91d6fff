"""Checkpoint names, `latest`, retention, and recovery when the process is killed at any file operation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron.checkpoint.discovery import (
    LATEST,
    PARTIAL,
    REPLACED,
    clean_leftovers,
    complete_steps,
    find_checkpoint,
    publish,
    steps_in,
    tag_name,
)
from megatron.checkpoint.manifest import FileEntry, Manifest, checksum, read_manifest, write_manifest
from megatron.checkpoint.retention import apply_retention
from megatron.checkpoint.set_aside import set_aside_later
from megatron.checkpoint.verify import verify_checkpoint
from megatron.common.errors import CheckpointError
from tests.support.kills import killed_at
from tests.support.log_lines import LogLines

pytestmark = pytest.mark.unit

OPTIMIZER = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
WEIGHTS = "layer_00-model_00-model_states.pt"


def save(root: Path, step: int, mark: str = "", by: str = "training") -> Path:
    """Save a checkpoint of two small files with the same calls as `save_checkpoint`."""
    final = root / tag_name(step)
    partial = root / (final.name + PARTIAL)
    clean_leftovers(root)
    partial.mkdir(parents=True)
    entries = {}
    for name in (WEIGHTS, OPTIMIZER):
        data = f"{name} {step} {mark}".encode()
        (partial / name).write_bytes(data)
        entries[name] = FileEntry(len(data), {}, checksum(data))
    write_manifest(partial, Manifest(entries, {"written_by": by, "optimizer": True, "mark": mark}))
    publish(partial, final)
    return final


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_latest_or_the_step_asked_for(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert steps_in(tmp_path) == [5, 10, 100]
    assert find_checkpoint(tmp_path) == tmp_path / "global_step100"
    assert find_checkpoint(f"{tmp_path}/", 5) == tmp_path / "global_step5"
    (tmp_path / LATEST).write_text("global_step10\n")  # users may go back, even if later steps exist
    assert find_checkpoint(tmp_path) == tmp_path / "global_step10"


def test_a_wrong_path_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it is empty; expected layer files"):
        find_checkpoint(tmp_path)
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"global_step7 does not exist, but `iteration` .*steps 5"):
        find_checkpoint(tmp_path, 7)
    (tmp_path / LATEST).write_text("global_step9")
    with pytest.raises(CheckpointError, match=r"global_step9 does not exist, but .*latest names it.*--iteration 5\)"):
        find_checkpoint(tmp_path)
    (tmp_path / LATEST).unlink()
    with pytest.raises(CheckpointError, match=r"latest cannot be read.*complete in .*: steps 5"):
        find_checkpoint(tmp_path)
    (tmp_path / LATEST).write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_an_incomplete_checkpoint_is_never_passed_over_in_silence(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    if damage == "missing":
        (folder / WEIGHTS).unlink()
    else:
        os.truncate(folder / WEIGHTS, 3)
    with pytest.raises(CheckpointError, match=rf"global_step10 is not complete: .*{WEIGHTS} .*--iteration 5\)"):
        find_checkpoint(tmp_path)
    assert complete_steps(tmp_path) == [5]


def test_a_checkpoint_of_gpt_neox_is_accepted_with_a_line(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / "manifest.json").unlink()
    log = LogLines()
    assert find_checkpoint(tmp_path) == folder
    assert "has no manifest.json" in log.lines[0]


def test_replacing_a_step_leaves_the_new_one(tmp_path: Path) -> None:
    save(tmp_path, 5, "old")
    save(tmp_path, 5, "new")
    assert read_manifest(find_checkpoint(tmp_path)).provenance["mark"] == "new"
    assert names(tmp_path) == {LATEST, "global_step5"}


def test_between_the_two_renames_the_old_one_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    folder.rename(tmp_path / ("global_step5" + REPLACED))
    assert find_checkpoint(tmp_path).name == "global_step5" + REPLACED
    clean_leftovers(tmp_path)
    assert find_checkpoint(tmp_path) == folder


def test_left_overs_go_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for name in ("global_step6.tmp", "global_step4.replaced.tmp", "notes.tmp", "tensorboard", "global_step7x"):
        (tmp_path / name).mkdir()
    clean_leftovers(tmp_path)
    assert names(tmp_path) == {LATEST, "global_step5", "notes.tmp", "tensorboard", "global_step7x"}


def test_keep_the_last_n(tmp_path: Path) -> None:
    root = Path(f"{tmp_path}/")  # GPT-NeoX deletes nothing when an absolute path ends in a slash
    for step in (1, 2, 10):
        save(root, step)
        apply_retention(root, step, 2, None)
    assert complete_steps(tmp_path) == [2, 10]


def test_retention_spares_what_is_not_ours_to_delete(tmp_path: Path) -> None:
    save(tmp_path, 0, by="tools/convert_hf")
    neox = save(tmp_path, 1)
    (neox / "manifest.json").unlink()
    save(tmp_path, 50)  # from before the user went back to 2
    for step in (2, 3):
        save(tmp_path, step)
        apply_retention(tmp_path, step, 1, None)
    assert steps_in(tmp_path) == [0, 1, 3, 50]


@pytest.mark.parametrize(("keep", "left"), [(0, []), (1, [3]), (2, [2, 3])])
def test_optimizer_states_go_before_the_weights(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
        apply_retention(tmp_path, step, None, keep)
    assert [step for step in (1, 2, 3) if (tmp_path / tag_name(step) / OPTIMIZER).exists()] == left
    for step in (1, 2, 3):
        assert verify_checkpoint(tmp_path / tag_name(step)) == []
        assert read_manifest(tmp_path / tag_name(step)).provenance["optimizer"] is (step in left)


def test_killed_at_every_operation_the_last_complete_one_is_found(tmp_path: Path) -> None:
    """Saves of a new and a replaced step, with both kinds of retention, are killed before each of their operations."""

    def work(root: Path) -> None:
        save(root, 3)
        apply_retention(root, 3, 2, 1)
        save(root, 3, "again")
        apply_retention(root, 3, 2, 1)

    for step in (1, 2):
        save(tmp_path / "before", step)
    for operation in range(1, 1000):
        root = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", root)
        killed = killed_at(operation, lambda root=root: work(root))
        found = find_checkpoint(root)
        assert verify_or_unlisted(found) == [], f"killed before operation {operation}"
        assert found.name.startswith(("global_step2", "global_step3"))
        manifest = read_manifest(found)
        clean_leftovers(root)
        assert read_manifest(find_checkpoint(root)) == manifest
        work(root)  # the next start
        assert complete_steps(root) == [2, 3]
        assert names(root) == {LATEST, "global_step2", "global_step3"}
        assert verify_checkpoint(root / "global_step2") == verify_checkpoint(root / "global_step3") == []
        if not killed:
            assert operation > 40, "the operations were not counted"
            return
    pytest.fail("the work never came to its end")


def test_the_first_save_killed_at_every_operation_is_whole_or_absent(tmp_path: Path) -> None:
    """Without an earlier `latest`, a checkpoint that already has its final name is still found."""
    for operation in range(1, 1000):
        root = tmp_path / str(operation)
        root.mkdir()
        killed = killed_at(operation, lambda root=root: save(root, 3))
        if steps_in(root):
            assert find_checkpoint(root).name == "global_step3", f"killed before operation {operation}"
        clean_leftovers(root)
        if steps_in(root):
            assert names(root) == {LATEST, "global_step3"}
        if not killed:
            return
    pytest.fail("the work never came to its end")


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "global_step3" / WEIGHTS).unlink()
    save(tmp_path, 4)
    log = LogLines()
    apply_retention(tmp_path, 4, 2, None)
    assert steps_in(tmp_path) == [2, 3, 4]
    assert complete_steps(tmp_path) == [2, 4]
    assert "global_step3 is not complete and is not counted" in log.warnings[0]


@pytest.mark.parametrize(("started_from", "left", "optimizers"), [(None, [3, 4], [4]), (1, [1, 3, 4], [1, 4])])
def test_the_checkpoint_that_the_run_was_started_from_stays(
    tmp_path: Path, started_from: int | None, left: list[int], optimizers: list[int]
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    apply_retention(tmp_path, 4, 2, 1, started_from)
    assert steps_in(tmp_path) == left
    assert [step for step in left if (tmp_path / tag_name(step) / OPTIMIZER).exists()] == optimizers


def test_later_checkpoints_are_renamed_and_never_overwritten(tmp_path: Path) -> None:
    for mark in ("first", "second"):
        for step in (1, 2, 3):
            save(tmp_path, step, mark)
        set_aside_later(tmp_path, 1)
        assert find_checkpoint(tmp_path).name == "global_step1"
    aside = {name for name in names(tmp_path) if "set_aside" in name}
    assert aside == {f"global_step{step}.set_aside{end}" for step in (2, 3) for end in ("", ".2")}
    assert read_manifest(tmp_path / "global_step3.set_aside").provenance["mark"] == "first"
    save(tmp_path, 2)
    apply_retention(tmp_path, 2, 1, 0)
    assert aside <= names(tmp_path), "the user's to delete"


def test_killed_at_every_operation_of_going_back_the_next_start_is_the_same(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "before", step)
    for operation in range(1, 100):
        root = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", root)
        killed = killed_at(operation, lambda root=root: set_aside_later(root, 1))
        kept = {read_manifest(path).provenance["mark"] for path in root.iterdir() if path.is_dir()}
        assert kept == {""}, "every folder is whole under some name"
        assert len([path for path in root.iterdir() if path.is_dir()]) == 3
        found = find_checkpoint(root).name
        assert found == "global_step1" if not killed else found in ("global_step1", "global_step3")
        if not killed:
            return
    pytest.fail("the work never came to its end")


def verify_or_unlisted(folder: Path) -> list[str]:
    """Problems, except for files that an unfinished retention no longer lists."""
    return [problem for problem in verify_checkpoint(folder) if OPTIMIZER not in problem]
