"""Building data sets from the keys of a run, and the configurations that are refused."""

import os
from pathlib import Path

import pytest
import torch

from megatron.common.labels import IGNORE_INDEX
from megatron.data.build import build_datasets, split_documents
from megatron.data.index_cache import CACHE_FOLDER
from megatron.data.indexed import DataError
from megatron.tokenizer import Tokenizer
from tests.support.configurations import data_args
from tests.support.data_commands import preprocess
from tests.support.made_data import S, blend_args, numbered, write
from tests.support.text_files import write_texts

pytestmark = pytest.mark.unit


def test_split() -> None:
    assert split_documents("969,30,1", 1000) == [(0, 969), (969, 999), (999, 1000)]
    assert split_documents("969/30/1", 1000) == split_documents("969, 30, 1", 1000)
    assert split_documents("1", 7) == [(0, 7), (7, 7), (7, 7)]
    assert split_documents("50,50", 3) == [(0, 1), (1, 3), (3, 3)]
    for bad in ("", "a,b", "1,1,1,1", "0,0,0", "2,-1", "nan", "inf,1"):
        with pytest.raises(DataError, match=f"split '{bad}': expected"):
            split_documents(bad, 10)


def test_build_blend_and_validation_apart(tmp_path: Path) -> None:
    datasets = build_datasets(blend_args(tmp_path))
    assert len(datasets.train) == 160
    from_b = sum(int(datasets.train[i]["tokens"][0]) >= 100_000 for i in range(160))
    assert from_b == 40
    assert [datasets.train[i]["sample_id"] for i in range(160)] == list(range(160))
    assert {name: len(d) for name, d in datasets.valid.items()} == {"v": 10, "b": 32}
    assert datasets.test == {}
    assert any("b: 40 samples, 25.00% of the run" in note for note in datasets.notes)


def test_build_from_one_path_and_split(tmp_path: Path) -> None:
    path = write(tmp_path / "one", numbered([20] * 50))
    datasets = build_datasets(data_args(data_path=path, train_iters=100))
    seen = {t for i in range(800) for t in datasets.train[i]["tokens"].tolist()}
    assert seen == set(range(800))  # only the first 40 documents
    assert list(datasets.valid) == list(datasets.test) == ["one"]
    for part, tokens in ((datasets.valid["one"], range(800, 900)), (datasets.test["one"], range(900, 1000))):
        labels = torch.cat([part[i]["labels"] for i in range(len(part))])
        assert sorted(labels[labels != IGNORE_INDEX].tolist()) == list(tokens)[1:]


def test_validation_names_are_unique(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    paths = [write(tmp_path / d / "text_document", numbered([40])) for d in ("x", "y")]
    args = data_args(train_data_paths=paths[:1], valid_data_paths=paths)
    assert list(build_datasets(args).valid) == ["x/text_document", "y/text_document"]
    with pytest.raises(DataError, match="given twice"):
        build_datasets(args.replace(valid_data_paths=[paths[0], paths[0]]))


def test_a_run_that_only_evaluates(tmp_path: Path) -> None:
    datasets = build_datasets(
        blend_args(tmp_path, task="eval", train_data_paths=None, train_data_weights=None, train_iters=None)
    )
    assert list(datasets.valid) == ["v", "b"]
    assert sorted(Path(prefix).name for prefix in datasets.fingerprints) == ["b", "v"]
    kept = [path.name for path in (tmp_path / CACHE_FOLDER).iterdir() if path.is_dir()]
    assert all("_ids_" in name for name in kept), "no order of training samples is built"
    with pytest.raises(DataError, match="no training data"):
        _ = datasets.train


def test_a_split_without_training_documents(tmp_path: Path) -> None:
    args = data_args(data_path=write(tmp_path / "one", numbered([20] * 50)), split="0,1,1")
    with pytest.raises(DataError, match="split leaves no document"):
        _ = build_datasets(args).train


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data: give data_path, or train_data_paths"):
        build_datasets(data_args("eval", train_iters=None))
    with pytest.raises(DataError, match=r"absent\.idx: no such file"):
        build_datasets(data_args(train_data_paths=[str(tmp_path / "absent")]))
    with pytest.raises(DataError, match="hold 1 tokens"):
        build_datasets(data_args(train_data_paths=[write(tmp_path / "s", numbered([1]))]))


def test_headers_are_checked_against_the_run(vocab_folder: Path, tmp_path: Path) -> None:
    assert preprocess(vocab_folder, tmp_path / "out", write_texts(tmp_path / "a.jsonl", ["some text"] * 9)) == 0
    prefix = str(tmp_path / "out_text_document")
    args = data_args(train_data_paths=[prefix], vocab_file=str(vocab_folder), eod_mask_loss=True)
    assert build_datasets(args).notes[0].startswith("train:")
    with pytest.raises(DataError, match="another tokenizer"):
        build_datasets(args.replace(tokenizer_type="TiktokenTokenizer"))
    with pytest.raises(DataError, match=r"pad token has id \d+; the model has only the ids 0 to 299"):
        build_datasets(args.replace(vocab_size=300))
    with pytest.raises(DataError, match="the model has only 300 ids"):
        build_datasets(args.replace(vocab_size=300, vocab_file=None, eod_mask_loss=False))


def test_many_sources_open_with_few_handles(tmp_path: Path) -> None:
    """150 sources have 300 data files and 450 index files; at most 64 of each kind are open at a time."""
    write(tmp_path / "0", numbered([40]))
    for i in range(1, 150):
        for ending in ("bin", "idx"):
            (tmp_path / f"{i}.{ending}").hardlink_to(tmp_path / f"0.{ending}")
    paths = [str(tmp_path / f"{i}") for i in range(150)]
    before = len(os.listdir("/proc/self/fd"))
    train = build_datasets(data_args(train_data_paths=paths, train_iters=2, train_batch_size=150)).train
    assert len(train[299]["tokens"]) == S
    assert len(os.listdir("/proc/self/fd")) - before <= 5 * 64 + 8


def test_the_tokenizer_gives_the_padding(hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    args = blend_args(tmp_path)
    assert build_datasets(args, hf_tokenizer).valid["v"].padding()["tokens"].unique().tolist() == [hf_tokenizer.pad]
