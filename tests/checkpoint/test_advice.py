"""The advice in messages about resuming is followed literally; the run must then begin as the message says."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.choice import StartChoice, choose_start, own_options
from megatron.checkpoint.discovery import find_checkpoint, meta_file_name
from megatron.checkpoint.layer_set import set_problems
from megatron.checkpoint.load import load_weights, ways_out
from megatron.checkpoint.owner import OWNER, FolderOwner, FolderTakenError
from megatron.checkpoint.start import Start, find_start
from megatron.checkpoint.verified import damage
from megatron.common.errors import CheckpointError
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.load import apply_overrides, parse_overrides
from tests.support.checkpoints import SHAPE, write_weights
from tests.support.configurations import keys
from tests.support.step_folders import write_step
from tools.convert_hf.cli import main as convert

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
    """A configuration with `first` in its YAML file and the options `typed` after it."""
    given = {name: str(folder / value) if name == "load" else value for name, value in first.items()}
    merged = keys(save=str(folder / "own"), checkpoint_factor=10, **given)
    apply_overrides(merged, {}, parse_overrides(typed.split()))
    return NeoXArgs.from_dict({name: value for name, value in merged.items() if value is not None})


def begins(folder: Path, first: dict[str, Any], typed: str) -> StartChoice:
    found = choose_start(configured(folder, first, typed), {})
    assert found is not None
    return found


@pytest.mark.parametrize("first", FIRST_STARTS)
def test_own_options_take_the_steps_of_the_run(folder: Path, first: dict[str, Any]) -> None:
    """Options given by the messages about `latest`, about damaged steps and about a step of `load`."""
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
    """The message about another layout or precision offers two ways; neither ends in the same error again."""
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


class Alone:
    """The only rank of a run, without a process group."""

    rank = 0

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        yield

    def broadcast(self, value: Any) -> Any:
        return value


def without_iteration(root: Path) -> None:
    write_weights(root, manifest=False)
    (root / "global_step0").rename(root / "weights")
    (root / "latest").write_text("weights")


def without_position(root: Path) -> None:
    write_step(root, 10)
    torch.save({"iteration": 10}, root / "global_step10" / meta_file_name(0))


@pytest.mark.parametrize(
    ("write", "said"),
    [(without_iteration, "its name says no iteration"), (without_position, "the run's position is unknown")],
)
def test_weights_without_a_position_are_taken_alone(folder: Path, write: Any, said: str) -> None:
    write(folder / "loaded")
    first = {"from_scratch": None, "load": "loaded"}
    ranks: Any = Alone()
    elsewhere = f"--save {folder / 'new'}"
    with pytest.raises(CheckpointError, match=said) as caught:
        find_start(ranks, configured(folder, first, elsewhere))
    advice = re.search(r"with `(finetune): (true)`", str(caught.value))
    assert advice
    start = find_start(ranks, configured(folder, first, f"{elsewhere} --{advice[1]} {advice[2]}"))
    assert (start.restored, start.position.iteration, start.restores_optimizer) == ("weights", 0, False)


def test_the_other_tensor_parallel_size(tmp_path: Path) -> None:
    """Two ways out: set TP to that of the files, or reshard the files to that TP."""
    step = write_weights(tmp_path / "two", tp=2)
    (tmp_path / "hf").mkdir()
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "num_hidden_layers": 2}
    config |= {"intermediate_size": 24, "vocab_size": 30, "rms_norm_eps": 1e-5, "model_type": "llama"}
    config |= {"rope_theta": 1e4, "rope_scaling": None, "max_position_embeddings": 64, "tie_word_embeddings": False}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (said,) = set_problems({path.name for path in step.iterdir()}, SHAPE, 1)
    assert set_problems({path.name for path in step.iterdir()}, SHAPE, int(said.partition("set it to ")[2][0])) == []
    command = re.search(r"`python tools/convert_hf (.*)`", said)
    assert command
    words = [*shlex.split(command[1]), "--input", str(tmp_path / "two"), "--output", str(tmp_path / "one")]
    assert convert([*words, "--hf-source", str(tmp_path / "hf")]) == 0
    assert set_problems({path.name for path in (tmp_path / "one" / step.name).iterdir()}, SHAPE, 1) == []


def test_weights_are_loaded_from_a_folder_that_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `load` set as the message asks, that folder is searched."""
    looked: list[Path] = []

    def locate(ranks: Any, root: Path, *rest: Any) -> None:
        looked.append(root)
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron.checkpoint.load.RankGroup", type("Ranks", (), {"world": lambda device: Alone()}))
    monkeypatch.setattr("megatron.checkpoint.load.locate", locate)
    engine: Any = type("Engine", (), {"place": type("Place", (), {"device": None})})
    with pytest.raises(CheckpointError, match="`load` is not set; give the folder that holds `latest`"):
        load_weights(engine, configured(folder, FIRST_STARTS[0]))
    with pytest.raises(KeyboardInterrupt):
        load_weights(engine, configured(folder, {"from_scratch": None, "load": "own"}))
    assert looked == [folder / "own"]
    assert (looked[0] / "latest").is_file()
