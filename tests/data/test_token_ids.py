"""Ids outside the vocabulary stop a run before it starts, with the same message from every rank and command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron.data.build import build_datasets
from megatron.data.indexed import DataError
from tests.support.configurations import data_args
from tests.support.made_data import write
from tests.support.ranks import run_ranks
from tools.datasets.build_indices import main as build_indices

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 576


def documents(*extra: int) -> list[np.ndarray]:
    return [np.arange(40), np.array([*range(30), *extra])]


@pytest.mark.unit
@pytest.mark.parametrize("part", ["text", "labels", "validation", "negative"])
def test_ids_outside_the_vocabulary(part: str, tmp_path: Path) -> None:
    good, bad = documents(VOCAB - 1), documents(-5 if part == "negative" else 600)
    text = write(tmp_path / "t", bad if part in ("text", "negative") else good)
    labels = write(tmp_path / "l", bad if part == "labels" else good)
    valid = write(tmp_path / "v", bad if part == "validation" else good)
    keys: dict[str, Any] = {
        "train_data_paths": [text],
        "train_label_data_paths": [labels],
        "valid_data_paths": [valid],
        "vocab_size": VOCAB,
    }
    message = "token id -5, which is negative" if part == "negative" else "token id 600 in document 1"
    for _ in range(2):  # the second time from the stored result
        with pytest.raises(DataError, match=message):
            build_datasets(data_args(**keys))
    if part == "text":
        assert len(build_datasets(data_args(**{**keys, "vocab_size": 601})).train)
        with pytest.raises(DataError, match="token id 600"):
            build_datasets(data_args("eval", **{**keys, "valid_data_paths": [text], "train_data_paths": None,
                                                "train_label_data_paths": None}))  # fmt: skip


@pytest.mark.unit
def test_special_tokens_outside_the_vocabulary(vocab_folder: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "t", documents())
    with pytest.raises(DataError, match=r"the pad token has id 772; the model has only the ids 0 to 769"):
        build_datasets(data_args(train_data_paths=[text], vocab_file=str(vocab_folder), vocab_size=770))
    with pytest.raises(DataError, match=r"end-of-document|pad"):
        build_datasets(data_args(train_data_paths=[text], vocab_file=str(vocab_folder), vocab_size=769))
    assert len(build_datasets(data_args(train_data_paths=[text], vocab_file=str(vocab_folder), vocab_size=1024)).train)


@pytest.mark.unit
def test_check_content_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = yaml.safe_load((ROOT / "configs/tiny/run.yml").read_text())
    model = ROOT / "configs/tiny/model.yml"
    outside = yaml.safe_load(model.read_text())["vocab_size"]
    text = write(tmp_path / "t", documents(outside))
    kept = ("optimizer", "train_iters", "precision")
    keys = {key: run[key] for key in kept if key in run} | {
        "train_data_paths": [text],
        "from_scratch": True,
        "seq_length": 16,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    (tmp_path / "run.yml").write_text(yaml.safe_dump(keys))
    command = [str(model), str(tmp_path / "run.yml"), "--world-size", "1"]
    for more in ([], ["--check-content"]):
        assert build_indices([*command, *more]) == 2
        assert f"token id {outside} in document 1" in capsys.readouterr().err
    # Rewritten tokens are checked again.
    np.array([*range(40), *range(30), 7], np.int32).tofile(f"{text}.bin")
    assert build_indices([*command, "--check-content"]) == 0
    assert "ids are in the vocabulary" in capsys.readouterr().out
    np.array([*range(40), *range(30), outside], np.int32).tofile(f"{text}.bin")
    assert build_indices(command) == 2
    assert f"token id {outside} in document 1" in capsys.readouterr().err


def _build(rank: int, world_size: int, bad: str, good: str) -> list[str]:
    answers = []
    for tp in (1, 2):
        for prefix in (bad, good):
            try:
                build_datasets(data_args(train_data_paths=[prefix], vocab_size=VOCAB, model_parallel_size=tp))
            except DataError as error:
                answers.append(str(error))
            else:
                answers.append("built")
    return answers


@pytest.mark.distributed
def test_every_rank_stops_with_the_same_answer(tmp_path: Path) -> None:
    bad, good = write(tmp_path / "b", documents(600)), write(tmp_path / "g", documents())
    first, second = run_ranks(_build, 2, bad, good)
    assert first == second
    assert "token id 600 in document 1" in first[0]
    assert first[0] == first[2]
    assert first[1] == first[3] == "built"
