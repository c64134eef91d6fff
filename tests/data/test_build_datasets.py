"""From the keys of a run to its data sets, and what is refused on the way."""

import os
from pathlib import Path

import pytest
import torch

from megatron.data import DataError, build_datasets
from megatron.data.build import split_documents
from megatron.data.index_cache import CACHE_FOLDER
from megatron.data.sample import IGNORED
from megatron.tokenizer import Tokenizer
from tests.support.data_commands import preprocess
from tests.support.made_data import Args, S, blend_args, numbered, write
from tests.support.text_files import write_texts

pytestmark = pytest.mark.unit


def test_split() -> None:
    assert split_documents("969,30,1", 1000) == [(0, 969), (969, 999), (999, 1000)]
    assert split_documents("969/30/1", 1000) == split_documents("969, 30, 1", 1000)
    assert split_documents("1", 7) == [(0, 7), (7, 7), (7, 7)]
    assert split_documents("50,50", 3) == [(0, 2), (2, 3), (3, 3)]
    for bad in ("", "a,b", "1,1,1,1", "0,0,0"):
        with pytest.raises(DataError):
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
    datasets = build_datasets(Args(data_path=path, vocab_size=None, train_iters=100))
    seen = {t for i in range(800) for t in datasets.train[i]["tokens"].tolist()}
    assert seen == set(range(800))  # the first 40 documents and no other
    assert list(datasets.valid) == list(datasets.test) == ["one"]
    for part, tokens in ((datasets.valid["one"], range(800, 900)), (datasets.test["one"], range(900, 1000))):
        labels = torch.cat([part[i]["labels"] for i in range(len(part))])
        assert sorted(labels[labels != IGNORED].tolist()) == list(tokens)[1:]


def test_validation_names_are_unique(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    paths = [write(tmp_path / d / "text_document", numbered([40])) for d in ("x", "y")]
    args = Args(train_data_paths=paths[:1], valid_data_paths=paths, vocab_size=None)
    assert list(build_datasets(args).valid) == ["x/text_document", "y/text_document"]
    args.valid_data_paths = [paths[0], paths[0]]
    with pytest.raises(DataError, match="given twice"):
        build_datasets(args)


def test_a_run_that_only_evaluates(tmp_path: Path) -> None:
    datasets = build_datasets(blend_args(tmp_path, train_data_paths=None, train_data_weights=None, train_iters=None))
    assert list(datasets.valid) == ["v", "b"]
    assert sorted(Path(prefix).name for prefix in datasets.fingerprints) == ["b", "v"]
    assert not (tmp_path / CACHE_FOLDER).exists()
    with pytest.raises(DataError, match="no training data"):
        _ = datasets.train


def test_refusals(tmp_path: Path) -> None:
    for changes, message in (
        ({"train_data_paths": None, "valid_data_paths": None}, "no data"),
        ({"data_path": "x"}, "either data_path"),
        ({"train_data_weights": [1.0]}, "1 entries for 2"),
        ({"train_label_data_paths": ["x"]}, "train_label_data_paths has 1 entries for 2"),
        ({"train_data_paths": [str(tmp_path / "absent")], "train_data_weights": None}, "absent.idx: no such file"),
        ({"eod_mask_loss": True}, "eod_mask_loss needs"),
    ):
        with pytest.raises(DataError, match=message):
            build_datasets(blend_args(tmp_path, **changes))
    with pytest.raises(DataError, match="hold 1 tokens"):
        build_datasets(Args(train_data_paths=[write(tmp_path / "s", numbered([1]))], vocab_size=None))


def test_headers_are_checked_against_the_run(vocab_folder: Path, tmp_path: Path) -> None:
    assert preprocess(vocab_folder, tmp_path / "out", write_texts(tmp_path / "a.jsonl", ["some text"] * 9)) == 0
    prefix = str(tmp_path / "out_text_document")
    args = Args(train_data_paths=[prefix], vocab_file=str(vocab_folder), eod_mask_loss=True)
    assert build_datasets(args).notes[0].startswith("train:")
    args.tokenizer_type = "TiktokenTokenizer"
    with pytest.raises(DataError, match="another tokenizer"):
        build_datasets(args)
    args.tokenizer_type, args.vocab_size = "HFTokenizer", 300
    with pytest.raises(DataError, match="the model has only 300"):
        build_datasets(args)


def test_a_thousand_sources_open_with_few_handles(tmp_path: Path) -> None:
    write(tmp_path / "0", numbered([40]))
    for i in range(1, 1000):
        for ending in ("bin", "idx"):
            (tmp_path / f"{i}.{ending}").hardlink_to(tmp_path / f"0.{ending}")
    paths = [str(tmp_path / f"{i}") for i in range(1000)]
    before = len(os.listdir("/proc/self/fd"))
    train = build_datasets(Args(train_data_paths=paths, vocab_size=None, train_iters=2, train_batch_size=1000)).train
    assert len(train[1999]["tokens"]) == S
    assert len(os.listdir("/proc/self/fd")) - before <= 5 * 64 + 8


def test_the_tokenizer_gives_the_padding(hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    args = blend_args(tmp_path)
    assert build_datasets(args, hf_tokenizer).valid["v"].padding()["tokens"].unique().tolist() == [hf_tokenizer.pad]
