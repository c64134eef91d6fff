"""What a run needs to start: disk space in every precision, and no data that it does not read."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.neox_arguments import NeoXArgs
from megatron.preflight.run_inputs import input_problems
from tests.support.configurations import keys
from tests.support.made_images import blobs, import_archive

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("precision", "weight"), [("fp32", 4), ("bfloat16", 2), ("fp16", 2)])
def test_a_checkpoint_has_to_find_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, weight: int
) -> None:
    args = NeoXArgs.from_dict(keys(precision=precision, save=str(tmp_path / "saves"), checkpoint_factor=5))
    needed = args.shape.num_parameters * (12 + weight)
    for free, said in ((needed * 2, False), (needed // 2, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        found = [problem for problem in input_problems(args) if problem.startswith("save: ")]
        assert bool(found) is said
        if said:
            assert f"one checkpoint of this model needs {needed / 1e9:,.3g} GB" in found[0]


TEXT_KEYS = ("vocab_file", "vocab_size", "make_vocab_size_divisible_by", "no_weight_tying")


def test_vectors_of_images_need_no_validation_data(tmp_path: Path) -> None:
    images = import_archive(tmp_path, "a", blobs(4, 16))
    absent = str(tmp_path / "absent")
    settings = keys(
        **dict.fromkeys(TEXT_KEYS),
        modality="patches",
        patches={"size": 8, "normalise": "patch"},
        seq_length=3,
        valid_data_paths=[absent],
        embed={"input": images, "output": str(tmp_path / "vectors.npy")},
    )
    assert input_problems(NeoXArgs.from_dict(settings, task="embed")) == []
    (problem,) = input_problems(NeoXArgs.from_dict(settings | {"embed": {"input": absent}}, task="embed"))
    assert absent in problem


def test_the_images_to_continue_are_looked_at_but_no_others(tmp_path: Path) -> None:
    images, absent = import_archive(tmp_path, "a", blobs(4, 16)), str(tmp_path / "absent")
    settings = keys(
        **dict.fromkeys((*TEXT_KEYS, "from_scratch")),
        modality="patches",
        patches={"size": 8, "normalise": "patch"},
        seq_length=3,
        valid_data_paths=[absent],
        load=str(tmp_path / "nowhere"),
    )
    for path, named in ((images, 0), (absent, 1)):
        found = input_problems(NeoXArgs.from_dict(settings | {"completion": {"path": path}}, task="generate"))
        assert sum("nowhere" in problem for problem in found) == 1
        assert sum(absent in problem for problem in found) == named
        assert len(found) == 1 + named
