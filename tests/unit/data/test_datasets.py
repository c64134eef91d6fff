"""Samples, their order, blends and micro-batches, without any process group."""

import itertools
import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from megatron.data import DataError, MicroBatches, build_datasets, fingerprint, index_cache
from megatron.data.blend import assign_sources, mix, shares
from megatron.data.build import split_documents
from megatron.data.index_cache import CACHE_FOLDER
from megatron.data.indexed import IndexedWriter, open_indexed
from megatron.data.sample import IGNORED, SampleForm
from megatron.data.sources import OncePacked, RunningPack
from megatron.data.whole import WholeDocuments
from megatron.tokenizer import Tokenizer
from tests.unit.data.test_preprocess import run, write_jsonl

pytestmark = pytest.mark.unit


@dataclass
class Args:
    """The keys that data reads, as NeoXArgs has them."""

    data_path: str | None = None
    split: str = "8,1,1"
    train_data_paths: Sequence[str | Any] | None = None
    valid_data_paths: list[str] | None = None
    test_data_paths: list[str] | None = None
    train_label_data_paths: list[str] | None = None
    valid_label_data_paths: list[str] | None = None
    test_label_data_paths: list[str] | None = None
    train_data_weights: list[float] | None = None
    tokenizer_type: str = "HFTokenizer"
    vocab_file: str | None = None
    vocab_size: int | None = 1024
    seq_length: int = 16
    seed: int = 1234
    eod_mask_loss: bool = False
    isolate_documents: bool = False
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked", "best_fit"] = "packed"
    allow_chopped: bool = True
    train_iters: int | None = 20
    train_epochs: float | None = None
    train_batch_size: int = 8
    skip_sample_ranges: list[list[int]] = field(default_factory=list)


def write(prefix: Path, documents: list[np.ndarray]) -> str:
    writer = IndexedWriter(prefix, np.dtype(np.int32))
    for document in documents:
        writer.add(document)
    writer.finish()
    return str(prefix)


def numbered(lengths: list[int], first: int = 0) -> list[np.ndarray]:
    """Documents whose tokens are all different: each tells its document and place."""
    starts = np.cumsum([first, *lengths])
    return [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]


LENGTHS = [7, 31, 2, 90, 1, 0, 13, 55, 24, 40]
S = 16


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write(tmp_path / "d", numbered(LENGTHS))


def stream_of(source: RunningPack, samples: int) -> np.ndarray:
    """The stream the samples were cut from, put together from its definition."""
    documents = numbered(LENGTHS)
    return np.concatenate([documents[d] for d in source.build_index()["order"].ravel()])[: samples * S + 1]


def test_samples_are_the_running_pack_of_shuffled_documents(prefix: str) -> None:
    source = RunningPack(prefix, SampleForm(S), seed=3, samples=50)
    samples = source.build_index()["samples"]
    stream = stream_of(source, len(samples))
    for i in range(50):
        k = int(samples[i])
        sample = source[i]
        assert sample["tokens"].tolist() == stream[k * S : k * S + S].tolist()
        assert sample["labels"].tolist() == stream[k * S + 1 : k * S + S + 1].tolist()
        assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
        assert "positions" not in sample


def test_every_epoch_reads_all_documents_and_samples_in_another_order(prefix: str) -> None:
    source = RunningPack(prefix, SampleForm(S), 3, 60)
    arrays = source.build_index()
    assert source.epochs >= 4
    for order in arrays["order"]:
        assert sorted(order) == list(range(10))
    assert len({tuple(order) for order in arrays["order"]}) == source.epochs
    assert sorted(arrays["samples"]) == list(range(len(arrays["samples"])))
    for epoch in range(source.epochs):
        first, behind = source.first_sample(epoch), source.first_sample(epoch + 1)
        assert sorted(arrays["samples"][first:behind]) == list(range(first, behind))


def test_a_longer_run_begins_like_a_shorter_one_and_the_seed_decides(prefix: str) -> None:
    def read(samples: int, seed: int, take: int) -> list[list[int]]:
        source = RunningPack(prefix, SampleForm(S), seed=seed, samples=samples)
        return [source[i]["tokens"].tolist() for i in range(take)]

    assert read(10, 3, 10) == read(200, 3, 10)
    assert read(10, 3, 10) != read(10, 4, 10)


def test_tiny_sources_cross_many_epochs_in_one_sample(tmp_path: Path) -> None:
    source = RunningPack(write(tmp_path / "t", numbered([2, 1])), SampleForm(S), seed=1, samples=20)
    for i in range(20):
        sample = source[i]
        assert set(sample["tokens"].tolist()) == {0, 1, 2}
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()


def test_one_pass_reads_every_token_once(prefix: str) -> None:
    source = OncePacked(prefix, SampleForm(S, pad=999), seed=3)
    samples = [source[i] for i in range(len(source))]
    labels = torch.cat([sample["labels"] for sample in samples])
    learned = labels[labels != IGNORED].tolist()
    assert len(learned) == len(set(learned)) == sum(LENGTHS) - 1
    padded = [sample for sample in samples if (sample["labels"] == IGNORED).any()]
    assert len(padded) == 1
    in_file_order = sorted(samples, key=lambda sample: int(sample["tokens"][0]))
    assert torch.cat([sample["tokens"] for sample in in_file_order])[: sum(LENGTHS)].tolist() == list(
        range(sum(LENGTHS))
    )
    assert [int(sample["tokens"][0]) for sample in samples] != [int(sample["tokens"][0]) for sample in in_file_order]
    tail = (sum(LENGTHS) - 1) % S
    assert padded[0]["labels"][:tail].min() >= 0
    assert padded[0]["tokens"][tail + 1 :].eq(999).all()
    short = OncePacked(write(Path(prefix).parent / "u", numbered([5])), SampleForm(S), 1)
    assert len(short) == 1
    assert short[0]["labels"].tolist() == [1, 2, 3, 4] + [IGNORED] * 12


def test_isolated_documents(prefix: str) -> None:
    plain = RunningPack(prefix, SampleForm(S), seed=3, samples=40)
    source = RunningPack(prefix, SampleForm(S, isolate_documents=True), seed=3, samples=40)
    document_of = {t: d for d, tokens in enumerate(numbered(LENGTHS)) for t in tokens.tolist()}
    boundaries = 0
    for i in range(40):
        tokens, labels, positions = (source[i][key].tolist() for key in ("tokens", "labels", "positions"))
        following = plain[i]["labels"].tolist()
        assert tokens == plain[i]["tokens"].tolist()
        expected, position = [], -1
        for j, token in enumerate(tokens):
            new = j == 0 or tokens[j] != tokens[j - 1] + 1 or document_of[token] != document_of[tokens[j - 1]]
            position = 0 if new else position + 1
            expected.append(position)
            same = document_of[following[j]] == document_of[token] and following[j] == token + 1
            assert labels[j] == (following[j] if same else IGNORED)
            boundaries += not same
        assert positions == expected
    assert boundaries > 20


def test_isolated_padding_is_a_document_of_its_own(tmp_path: Path) -> None:
    form = SampleForm(S, isolate_documents=True)
    source = OncePacked(write(tmp_path / "u", numbered([3, 2])), form, 1)
    assert sorted(source[0]["positions"].tolist()[:5]) == [0, 0, 1, 1, 2]
    assert source[0]["positions"].tolist()[5:] == list(range(11))
    assert (source[0]["labels"] >= 0).sum() == 3


def whole(prefix: str, packing: str, samples: int | None = None, **options: bool) -> WholeDocuments:
    return WholeDocuments(prefix, SampleForm(S, pad=999), 3, samples, packing, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow", "best_fit"])
@pytest.mark.parametrize("samples", [None, 100])
def test_whole_documents(prefix: str, packing: str, samples: int | None) -> None:
    source = whole(prefix, packing, samples)
    document_of = {t: d for d, tokens in enumerate(numbered(LENGTHS)) for t in tokens.tolist()}
    expected = sorted(t for d in numbered(LENGTHS) if len(d) > 1 for t in d.tolist()[1:])
    epochs = [int(first) for first in source.build_index()["epochs"]]
    assert epochs[1] == source.samples_per_epoch
    assert len(source) == (epochs[1] if samples is None else 100)
    for start, stop in itertools.pairwise(e for e in epochs if e <= len(source)):
        learned: list[int] = []
        for i in range(start, stop):
            tokens, labels = source[i]["tokens"].tolist(), source[i]["labels"].tolist()
            pieces = source.pieces(i)
            assert sum(length for _, _, length in pieces) <= S + 1
            assert packing != "unpacked" or len(pieces) == 1
            for t, label in zip(tokens, labels, strict=True):
                if label != IGNORED and t in document_of and document_of[label] == document_of[t]:
                    assert label == t + 1
                    learned.append(label)
        # every token of every document is learned once an epoch, those behind a cut too
        assert sorted(learned) == expected


def test_best_fit_leaves_little_room(tmp_path: Path) -> None:
    lengths = np.random.RandomState(5).randint(2, S + 2, 400).tolist()
    prefix = write(tmp_path / "b", numbered(lengths))
    ideal = sum(lengths) / (S + 1)
    best, overflow, alone = (
        whole(prefix, p).samples_per_epoch for p in ("best_fit", "pack_until_overflow", "unpacked")
    )
    assert ideal <= best < 1.03 * ideal < overflow < alone == 400


def test_whole_documents_in_another_order_every_epoch_but_not_in_a_longer_run(prefix: str) -> None:
    for packing in ("unpacked", "pack_until_overflow", "best_fit"):
        short, long = whole(prefix, packing, 20), whole(prefix, packing, 90)
        assert [short.pieces(i) for i in range(20)] == [long.pieces(i) for i in range(20)]
        epoch = int(long.samples_per_epoch)
        assert [long.pieces(i) for i in range(epoch)] != [long.pieces(i) for i in range(epoch, 2 * epoch)]


def test_documents_that_do_not_fit_are_left_out_on_demand(prefix: str, tmp_path: Path) -> None:
    source = whole(prefix, "unpacked", chop=False)
    assert sorted(d for i in range(len(source)) for d, _, _ in source.pieces(i)) == [0, 2, 6]
    assert source.dropped == 5
    with pytest.raises(DataError, match="no document has 2 to 17 tokens"):
        whole(write(tmp_path / "long", numbered([18, 40])), "best_fit", chop=False)


def test_isolated_whole_documents_restart_at_each(tmp_path: Path) -> None:
    prefix = write(tmp_path / "w", numbered([5, 6, 4]))
    source = WholeDocuments(prefix, SampleForm(S, isolate_documents=True), 3, None, "pack_until_overflow")
    sample = source[0]
    assert len(source) == 1
    assert sample["positions"].tolist() == [*range(5), *range(6), *range(4), 0]
    assert (sample["labels"] != IGNORED).sum() == 4 + 5 + 3


def test_the_packing_is_chosen_by_the_run(tmp_path: Path) -> None:
    lengths = {}
    for packing in ("packed", "unpacked", "pack_until_overflow", "best_fit"):
        datasets = build_datasets(blend_args(tmp_path, pack_impl=packing, allow_chopped=True, seq_length=60))
        lengths[packing] = len(datasets.valid["b"])
        assert len(datasets.train) == 160
    assert lengths == {"packed": 9, "unpacked": 20, "pack_until_overflow": 10, "best_fit": 10}


def test_eod_mask_loss(tmp_path: Path) -> None:
    documents = [np.array([1, 2, 3, 9]), np.array([4, 5, 9]), np.array([6, 9])]
    source = RunningPack(write(tmp_path / "e", documents), SampleForm(S, masked_input=9), 1, 10)
    for i in range(10):
        sample = source[i]
        assert ((sample["labels"] == IGNORED) == (sample["tokens"] == 9)).all()
        assert (sample["labels"] == 9).any()  # the end itself is learned


def test_label_data(tmp_path: Path, prefix: str) -> None:
    documents = numbered(LENGTHS)
    labels = [np.where(d % 3 == 0, -100, d) for d in documents]
    source = RunningPack(prefix, SampleForm(S), 3, 30, labels=write(tmp_path / "l", labels))
    plain = RunningPack(prefix, SampleForm(S), 3, 30)
    for i in range(30):
        expected = plain[i]["labels"].clone()
        expected[expected % 3 == 0] = IGNORED
        assert source[i]["labels"].tolist() == expected.tolist()
        assert source[i]["tokens"].tolist() == plain[i]["tokens"].tolist()
    wrong = write(tmp_path / "w", [*documents[:-1], documents[-1][:-1]])
    with pytest.raises(DataError, match="do not go with text"):
        RunningPack(prefix, SampleForm(S), 3, 30, labels=wrong)


@pytest.mark.parametrize("weights", [[1], [0.8, 0.2], [1, 0, 3], [1000] + [1] * 999, [3] * 40 + [0.001] * 7])
def test_every_stretch_of_a_blend_holds_the_shares(weights: list[float]) -> None:
    share = shares(weights)
    source_of, within = assign_sources(share, 20_000)
    for n in (1, 10, 333, 5000, 20_000):
        counts = np.bincount(source_of[:n], minlength=len(weights))
        assert np.abs(counts - share * n).max() < 3
    for source in range(len(weights)):
        assert within[source_of == source].tolist() == list(range((source_of == source).sum()))
    shorter = assign_sources(share, 777)
    assert shorter[0].tolist() == source_of[:777].tolist()


def test_realised_shares_are_within_a_tenth_of_a_percent() -> None:
    share = shares([0.55, 0.25, 0.1999, 0.0001])
    source_of, _ = assign_sources(share, 1_000_000)
    assert np.abs(np.bincount(source_of, minlength=4) / 1_000_000 - share).max() < 1e-5


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_senseless_weights(weights: list[float]) -> None:
    with pytest.raises(DataError, match="data weights"):
        shares(weights)


def test_split() -> None:
    assert split_documents("969,30,1", 1000) == [(0, 969), (969, 999), (999, 1000)]
    assert split_documents("969/30/1", 1000) == split_documents("969, 30, 1", 1000)
    assert split_documents("1", 7) == [(0, 7), (7, 7), (7, 7)]
    assert split_documents("50,50", 3) == [(0, 2), (2, 3), (3, 3)]
    for bad in ("", "a,b", "1,1,1,1", "0,0,0"):
        with pytest.raises(DataError):
            split_documents(bad, 10)


def blend_args(tmp_path: Path, **changes: object) -> Args:
    a = write(tmp_path / "a", numbered([30] * 40))
    b = write(tmp_path / "b", numbered([25] * 20, first=100_000))
    v = write(tmp_path / "v", numbered([25] * 6, first=200_000))
    args = Args(train_data_paths=[a, b], train_data_weights=[3, 1], valid_data_paths=[v, b], vocab_size=None)
    for key, value in changes.items():
        setattr(args, key, value)
    return args


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
    assert run(vocab_folder, tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["some text"] * 9)) == 0
    prefix = str(tmp_path / "out_text_document")
    args = Args(train_data_paths=[prefix], vocab_file=str(vocab_folder), eod_mask_loss=True)
    assert build_datasets(args).notes[0].startswith("train:")
    args.tokenizer_type = "TiktokenTokenizer"
    with pytest.raises(DataError, match="another tokenizer"):
        build_datasets(args)
    args.tokenizer_type, args.vocab_size = "HFTokenizer", 300
    with pytest.raises(DataError, match="the model has only 300"):
        build_datasets(args)


@dataclass
class Replayed:
    """An entry of train_data_paths with replay, and its replay keys in one."""

    path: str
    share: float
    fresh_each_epoch: bool = True

    @property
    def replay(self) -> "Replayed":
        return self


def general_tokens(args: Args, epoch: float) -> list[list[int]]:
    """Tokens of the replayed source (ids from 100,000), by epoch of the corpus."""
    train = build_datasets(args).train
    found: list[list[int]] = [[] for _ in range(int(len(train) / epoch) + 1)]
    for i in range(len(train)):
        tokens = train[i]["tokens"].tolist()
        if tokens[0] >= 100_000:
            found[int(i / epoch)] += tokens
    return found


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow"])
@pytest.mark.parametrize("fresh", [True, False])
def test_replay(tmp_path: Path, fresh: bool, packing: str) -> None:
    domain = [write(tmp_path / f"d{i}", numbered([S] * n, first=10_000 * i)) for i, n in enumerate((150, 50))]
    general = write(tmp_path / "g", numbered([S] * 175, first=100_000))
    replayed = Replayed(general, 0.2, fresh)
    args = Args(train_data_paths=[*domain, replayed], vocab_size=None, train_iters=100, pack_impl=packing)
    epoch = 200 / 0.8
    by_epoch = general_tokens(args, epoch)
    assert [len(tokens) // S for tokens in by_epoch] == [50, 50, 50, 10]
    if fresh:
        read = [t for tokens in by_epoch for t in tokens]
        assert len(set(read)) == len(read)  # nothing is repeated: 160 of 175 samples were used
    else:
        assert sorted(by_epoch[0]) == sorted(by_epoch[1]) == sorted(by_epoch[2])
    datasets = build_datasets(args)
    assert "20.00% of the run" in datasets.notes[-1]
    assert "by epoch of the corpus 20.00%, 20.00%, 20.00%, 20.00%" in datasets.notes[-1]
    seen = [datasets.train[i]["tokens"].tolist() for i in range(250)]
    in_domain = [t for tokens in seen for t in tokens if t < 100_000]
    assert len(in_domain) == 200 * S
    assert len(set(in_domain)) >= 0.97 * 200 * S  # the corpus is read once, but for the seam of its two sources


def test_exhausted_replay_begins_again_in_another_order(tmp_path: Path) -> None:
    domain = write(tmp_path / "d", numbered([S] * 100))
    general = write(tmp_path / "g", numbered([S] * 20, first=100_000))
    args = Args(train_data_paths=[domain, Replayed(general, 0.2)], vocab_size=None, train_iters=25)
    read = [t for tokens in general_tokens(args, 125) for t in tokens]
    assert len(read) == 40 * S
    assert sorted(read[: 20 * S]) == sorted(read[20 * S :]) == list(range(100_000, 100_000 + 20 * S))
    assert read[: 20 * S] != read[20 * S :]


def test_realised_replay_over_a_million_samples() -> None:
    replay = Replayed("", 0.2)
    mixture = mix([90_000.3, 30_000.9, 1e9], None, [None, None, replay], 1_000_000)
    assert mixture.epoch is not None
    edges = np.arange(0, 1_000_000, mixture.epoch).astype(int)
    for first, behind in itertools.pairwise(edges):
        part = mixture.source_of[first:behind]
        assert abs((part == 2).mean() - 0.2) < 0.001
        assert abs((part == 0).mean() - 0.8 * 0.75) < 0.001


def test_senseless_replay() -> None:
    for replays, weights, message in (
        ([Replayed("", 0.2)], None, "leave something"),
        ([None, Replayed("", 0.6), Replayed("", 0.4)], None, "leave something"),
        ([None, Replayed("", 0.2)], [1.0, 2.0], "2 entries for 1 train_data_paths without replay"),
    ):
        with pytest.raises(DataError, match=message):
            mix([1.0] * len(replays), weights, replays, 10)


def ids(batches: MicroBatches) -> list[list[int]]:
    return [batch["sample_id"].tolist() for batch in batches]


def test_the_order_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    train = build_datasets(blend_args(tmp_path)).train

    def order(micro: int, dp: int, accumulation: int, consumed: int = 0) -> list[int]:
        ranks = [ids(MicroBatches(train, micro, r, dp, accumulation, consumed)) for r in range(dp)]
        return [i for step in zip(*ranks, strict=True) for part in step for i in part]

    assert order(8, 1, 1) == list(range(160))
    for layout in ((1, 1, 8), (4, 2, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)):
        assert order(*layout) == list(range(160))
        assert order(*layout, consumed=56) == list(range(56, 160))


def test_batches(tmp_path: Path) -> None:
    train = build_datasets(blend_args(tmp_path, isolate_documents=True)).train
    batches = MicroBatches(train, 2, 1, 2, 2, consumed_samples=32)
    assert len(batches) == 32
    first = next(batches)
    assert first["sample_id"].tolist() == [34, 35]
    assert {key: tuple(value.shape) for key, value in first.items()} == {
        "tokens": (2, 16),
        "labels": (2, 16),
        "positions": (2, 16),
        "sample_id": (2,),
    }
    assert first["tokens"][1].tolist() == train[35]["tokens"].tolist()
    assert batches.consumed_samples == 32  # half a global batch has not been consumed
    next(batches)
    assert batches.consumed_samples == 40


def test_a_last_batch_is_completed_with_samples_that_teach_nothing(tmp_path: Path) -> None:
    valid = build_datasets(blend_args(tmp_path)).valid["v"]
    batches = [*MicroBatches(valid, 2, 0, 2, 2), *MicroBatches(valid, 2, 1, 2, 2)]
    seen = torch.cat([batch["sample_id"] for batch in batches])
    assert sorted(seen.tolist()) == [-1] * 6 + list(range(10))
    for batch in batches:
        assert (batch["labels"][batch["sample_id"] == -1] == IGNORED).all()
    with pytest.raises(ValueError, match="make no sense"):
        MicroBatches(valid, 1, 2, 2, 1)


def test_seeking_reads_nothing_before(prefix: str) -> None:
    class Counting:
        reads = 0

        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: int) -> dict:
            Counting.reads += 1
            return {"tokens": torch.zeros(1), "labels": torch.zeros(1), "sample_id": index}

        def padding(self) -> dict:
            raise AssertionError

    assert next(MicroBatches(Counting(), 4, 3, 8, 2, 10**11))["sample_id"].tolist() == [
        10**11 + 12 + i for i in range(4)
    ]
    assert Counting.reads == 4


def cached(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / CACHE_FOLDER).iterdir() if p.is_dir())


def test_an_index_is_kept_and_follows_content_and_settings(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", numbered(LENGTHS))
    RunningPack(prefix, SampleForm(S), 3, 50)
    before = {p: p.stat().st_mtime_ns for p in cached(tmp_path)[0].iterdir()}
    RunningPack(prefix, SampleForm(S), 3, 50)
    assert {p: p.stat().st_mtime_ns for p in cached(tmp_path)[0].iterdir()} == before
    for i, source in enumerate(((S, 4, None), (S + 1, 3, None), (S, 3, (0, 9)), (S, 3, (1, 10)))):
        RunningPack(prefix, SampleForm(source[0]), source[1], 50, source[2])
        assert len(cached(tmp_path)) == i + 2
    write(tmp_path / "d", numbered(list(reversed(LENGTHS))))
    open_indexed.cache_clear()
    RunningPack(prefix, SampleForm(S), 3, 50)
    assert len(cached(tmp_path)) == 6


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", numbered(LENGTHS))
    RunningPack(prefix, SampleForm(S), 5, 50)
    folder = cached(tmp_path)[0]
    for path in [*folder.iterdir()]:
        content = path.read_bytes()
        for damage in (content[:-9], b"", None):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            index_cache._mapped.cache_clear()
            with pytest.raises(DataError, match=f"{folder.name}: damaged index"):
                RunningPack(prefix, SampleForm(S), 5, 50)
        path.write_bytes(content)


def test_a_folder_that_cannot_be_written_to_is_no_hindrance(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [RunningPack(prefix, SampleForm(S), 3, 9)[i]["tokens"].tolist() for i in range(9)]

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    source = RunningPack(prefix, SampleForm(S), 3, 500)
    assert [source[i]["tokens"].tolist() for i in range(9)] == expected


def _build(prefix: str, barrier: Barrier, folder: str) -> None:
    original = RunningPack.build_index

    def counted(source: RunningPack) -> index_cache.Arrays:
        with open(f"{folder}/built", "a") as file:
            file.write("x")
        return original(source)

    RunningPack.build_index = counted  # type: ignore[method-assign]
    barrier.wait()
    RunningPack(prefix, SampleForm(S), 3, 5000)
    os._exit(0)


def test_of_eight_processes_that_start_at_once_one_builds(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", numbered(LENGTHS))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    processes = [context.Process(target=_build, args=(prefix, barrier, str(tmp_path))) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "built").read_text() == "x"


def test_fingerprint(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", numbered(LENGTHS))
    first = fingerprint(prefix)
    assert json.loads(json.dumps(first)) == first
    assert set(first) == {"path", "idx_bytes", "bin_bytes", "hash"}
    assert fingerprint(prefix) == first
    write(tmp_path / "d", numbered([8, 30, *LENGTHS[2:]]))  # same sizes of files, other documents
    assert fingerprint(prefix)["bin_bytes"] == first["bin_bytes"]
    assert fingerprint(prefix)["hash"] != first["hash"]


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
