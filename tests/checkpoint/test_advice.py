"""What the messages of a resume advise is typed, literally, and the run begins where they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.choice import StartChoice, choose_start, own_options
from megatron.checkpoint.discovery import find_checkpoint
from megatron.checkpoint.load import ways_out
from megatron.checkpoint.owner import OWNER, FolderOwner, FolderTakenError
from megatron.checkpoint.start import Start
from megatron.checkpoint.verified import damage
from megatron.common.errors import CheckpointError
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.load import apply_overrides, parse_overrides
from tests.support.configurations import keys
from tests.support.step_folders import write_step

pytestmark = pytest.mark.unit

FIRST_STARTS: list[dict[str, Any]] = [
    {"from_scratch": True},
    {"from_scratch": None, "load": "converted", "finetune": True},
    {"from_scratch": None, "load": "converted", "no_load_optim": True},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_step(tmp_path / "converted", 0, by="tools/convert_hf")
    for step in (10, 20, 30):
        write_step(tmp_path / "own", step)
    return tmp_path


def configured(folder: Path, first: dict[str, Any], typed: str = "") -> NeoXArgs:
    """A configuration whose YAML says `first`, with options typed behind it."""
    given = {name: str(folder / value) if name == "load" else value for name, value in first.items()}
    merged = keys(save=str(folder / "own"), checkpoint_factor=10, **given)
    apply_overrides(merged, {}, parse_overrides(typed.split()))
    return NeoXArgs.from_dict({name: value for name, value in merged.items() if value is not None})


def begins(folder: Path, first: dict[str, Any], typed: str) -> StartChoice:
    found = choose_start(configured(folder, first, typed), {})
    assert found is not None
    return found


@pytest.mark.parametrize("first", FIRST_STARTS)
def test_own_options_take_a_run_s_own_steps(folder: Path, first: dict[str, Any]) -> None:
    """As the messages about `latest`, about damaged steps and about a step of `load` give them."""
    options = own_options(configured(folder, first))
    found = begins(folder, first, f"{options} --iteration 10")
    assert (found.root, found.iteration, found.own_save) == (folder / "own", 10, True)
    assert found.restored == ("weights and position" if "no_load_optim" in first else "everything")
    (folder / "own" / "latest").unlink()
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(folder / "own", None, options)
    advice = re.search(r"choose one with (.*)\)", str(caught.value))
    assert advice
    assert begins(folder, first, advice[1]).iteration == 30


@pytest.mark.parametrize("first", FIRST_STARTS)
def test_ways_out_of_an_unfit_optimizer(folder: Path, first: dict[str, Any]) -> None:
    """Both that the message about another split or precision offers; neither gives the same error again."""
    said = ways_out(configured(folder, first), Start(own_save=True))
    keep, anew = re.findall(r"with (--[^,]*)", said)
    found = begins(folder, first, keep)
    assert (found.root, found.restored) == (folder / "own", "weights and position")
    found = begins(folder, first, anew.replace("NEW", str(folder / "new")))
    assert (found.root, found.restored, found.own_save) == (folder / "own", "weights", False)
    elsewhere = ways_out(configured(folder, FIRST_STARTS[1]), Start())
    for advice, restored in zip(
        re.findall(r"with (--\S+ true)", elsewhere), ("weights", "weights and position"), strict=True
    ):
        assert begins(folder, {"from_scratch": None, "load": "own"}, f"{advice} --save {folder}/x").restored == restored


def test_an_earlier_step_is_taken_instead(folder: Path) -> None:
    said = damage(folder / "own" / "global_step30" / "x", "crc32:0", "crc32:1")
    advice = said.partition("earlier one with ")[2]
    assert begins(folder, FIRST_STARTS[0], advice.replace("N", "20")).iteration == 20


def test_another_folder_or_a_removed_claim(folder: Path) -> None:
    FolderOwner(folder / "own").acquire()
    with pytest.raises(FolderTakenError) as caught:
        FolderOwner(folder / "own").acquire()
    said = str(caught.value)
    option = re.search(r"--save NEW", said)
    assert option
    args = configured(folder, FIRST_STARTS[0], option[0].replace("NEW", str(folder / "new")))
    FolderOwner(Path(str(args.save))).acquire()
    removed = said.partition("remove ")[2]
    assert removed == str(folder / "own" / OWNER)
    Path(removed).unlink()
    FolderOwner(folder / "own").acquire()
