"""Samples of one source: the running pack, whole documents, one pass, labels, isolation."""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.common.labels import IGNORE_INDEX
from megatron.data.build import build_datasets
from megatron.data.document_packing import WholeDocuments
from megatron.data.gpt_neox_order import GptNeoxPack
from megatron.data.indexed import DataError
from megatron.data.sample import SampleForm
from megatron.data.sources import OncePacked, RunningPack
from tests.support.made_data import LENGTHS, S, blend_args, numbered, write

pytestmark = pytest.mark.unit


def stream_of(source: RunningPack, samples: int) -> np.ndarray:
    """The stream from which the samples were cut, built from its definition."""
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
        first, end = source.first_sample(epoch), source.first_sample(epoch + 1)
        assert sorted(arrays["samples"][first:end]) == list(range(first, end))


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
    learned = labels[labels != IGNORE_INDEX].tolist()
    assert len(learned) == len(set(learned)) == sum(LENGTHS) - 1
    padded = [sample for sample in samples if (sample["labels"] == IGNORE_INDEX).any()]
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
    assert short[0]["labels"].tolist() == [1, 2, 3, 4] + [IGNORE_INDEX] * 12


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
            assert labels[j] == (following[j] if same else IGNORE_INDEX)
            boundaries += not same
        assert positions == expected
    assert boundaries > 20


def test_isolated_padding_is_a_document_of_its_own(tmp_path: Path) -> None:
    form = SampleForm(S, isolate_documents=True)
    source = OncePacked(write(tmp_path / "u", numbered([3, 2])), form, 1)
    assert sorted(source[0]["positions"].tolist()[:5]) == [0, 0, 1, 1, 2]
    assert source[0]["positions"].tolist()[5:] == list(range(11))
    assert (source[0]["labels"] >= 0).sum() == 3


def whole(prefix: str, packing: str, samples: int | None = None, **options: object) -> WholeDocuments:
    return WholeDocuments(prefix, SampleForm(S, pad=999), 3, samples, packing, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow", "best_fit"])
@pytest.mark.parametrize("samples", [None, 100])
def test_whole_documents(prefix: str, packing: str, samples: int | None) -> None:
    source = whole(prefix, packing, samples, chop=True)
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
                if label != IGNORE_INDEX and t in document_of and document_of[label] == document_of[t]:
                    assert label == t + 1
                    learned.append(label)
        # every token of every document is learned once per epoch, also after a cut
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
        short, long = whole(prefix, packing, 20, chop=True), whole(prefix, packing, 90, chop=True)
        assert [short.pieces(i) for i in range(20)] == [long.pieces(i) for i in range(20)]
        epoch = int(long.samples_per_epoch)
        assert [long.pieces(i) for i in range(epoch)] != [long.pieces(i) for i in range(epoch, 2 * epoch)]


def test_documents_that_do_not_fit_are_left_out_and_counted(prefix: str, tmp_path: Path) -> None:
    source = whole(prefix, "unpacked")
    assert sorted(d for i in range(len(source)) for d, _, _ in source.pieces(i)) == [0, 2, 6]
    too_long = [length for length in LENGTHS if length > S + 1]
    share = sum(too_long) / sum(LENGTHS)
    assert source.describe_left_out() == [
        f"{prefix}: 5 documents of 10 ({share:.2%} of the tokens) longer than a sample of 16 tokens and left out; "
        f"allow_chopped: true cuts them",
        f"{prefix}: 2 documents of 10 (0.38% of the tokens) left out: fewer than two tokens",
    ]
    assert "and cut" in whole(prefix, "unpacked", chop=True).describe_left_out()[0]
    with pytest.raises(DataError, match="no document has 2 to 17 tokens"):
        whole(write(tmp_path / "long", numbered([18, 40])), "best_fit")


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow", "best_fit"])
def test_what_has_no_target_is_left_out_and_counted(packing: str, tmp_path: Path) -> None:
    documents = numbered([10, 12, 40, 6])
    labels = [np.full(len(document), IGNORE_INDEX) for document in documents]
    labels[0][5:] = documents[0][5:]
    labels[2][:4] = documents[2][:4]  # targets in the first of its three pieces
    labels[3][0] = documents[3][0]  # the first token of a document is never a target
    prefix, targets = write(tmp_path / "t", documents), write(tmp_path / "l", labels)
    for chop, kept, lines in (
        (
            False,
            [0],
            ["1 documents of 4 (58.82% of the tokens) longer", "2 documents of 4 (26.47% of the tokens) left out"],
        ),
        (True, [0, 2], ["1 documents of 4 (58.82% of the tokens) longer", "4 documents and pieces of 4"]),
    ):
        source = whole(prefix, packing, chop=chop, labels=targets)
        assert sorted(d for i in range(len(source)) for d, _, _ in source.pieces(i)) == kept
        assert all((source[i]["labels"] != IGNORE_INDEX).any() for i in range(len(source)))
        for line, found in zip(lines, source.describe_left_out(), strict=True):
            assert line in found
    silent = write(tmp_path / "s", [np.full(len(document), IGNORE_INDEX) for document in documents])
    with pytest.raises(DataError, match="have no target"):
        whole(prefix, packing, chop=True, labels=silent)


def test_isolated_whole_documents_restart_at_each(tmp_path: Path) -> None:
    prefix = write(tmp_path / "w", numbered([5, 6, 4]))
    source = WholeDocuments(prefix, SampleForm(S, isolate_documents=True), 3, None, "pack_until_overflow")
    sample = source[0]
    assert len(source) == 1
    assert sample["positions"].tolist() == [*range(5), *range(6), *range(4), 0]
    assert (sample["labels"] != IGNORE_INDEX).sum() == 4 + 5 + 3


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
        assert ((sample["labels"] == IGNORE_INDEX) == (sample["tokens"] == 9)).all()
        assert (sample["labels"] == 9).any()  # the end-of-document token itself is learned


def test_label_data(tmp_path: Path, prefix: str) -> None:
    documents = numbered(LENGTHS)
    labels = [np.where(d % 3 == 0, -100, d) for d in documents]
    source = RunningPack(prefix, SampleForm(S), 3, 30, labels=write(tmp_path / "l", labels))
    plain = RunningPack(prefix, SampleForm(S), 3, 30)
    for i in range(30):
        expected = plain[i]["labels"].clone()
        expected[expected % 3 == 0] = IGNORE_INDEX
        assert source[i]["labels"].tolist() == expected.tolist()
        assert source[i]["tokens"].tolist() == plain[i]["tokens"].tolist()
    wrong = write(tmp_path / "w", [*documents[:-1], documents[-1][:-1]])
    with pytest.raises(DataError, match="do not go with text"):
        RunningPack(prefix, SampleForm(S), 3, 30, labels=wrong)


def test_packed_samples_without_a_target_are_left_out_and_counted(tmp_path: Path) -> None:
    """Every target still occurs once per epoch, and a longer run begins like a shorter one."""
    documents = numbered([30, 41, 26, 39, 20])
    labels = [np.full(len(document), IGNORE_INDEX) for document in documents]
    labels[1][20:24], labels[3][5] = documents[1][20:24], documents[3][5]
    prefix, targets = write(tmp_path / "t", documents), write(tmp_path / "l", labels)
    expected = sorted([*documents[1][20:24].tolist(), int(documents[3][5])])

    def learned(source: Any, samples: int) -> list[list[int]]:
        found = [source[i]["labels"] for i in range(samples)]
        return [row[row != IGNORE_INDEX].tolist() for row in found]

    form = SampleForm(S)
    source = RunningPack(prefix, form, 3, 40, labels=targets)
    read = learned(source, 40)
    assert all(read)
    counts = Counter(itertools.chain(*read))
    assert sorted(counts) == expected
    assert max(counts.values()) - min(counts.values()) <= 1
    assert learned(RunningPack(prefix, form, 3, 7, labels=targets), 7) == read[:7]
    (line,) = source.describe_left_out()
    assert re.search(
        r"t: [5-8] samples of 10 \([5-8]0\.00% of the tokens\) in the first epoch left out: no target", line
    )
    once = OncePacked(prefix, form, 3, labels=targets)
    assert sorted(itertools.chain(*learned(once, len(once)))) == expected
    assert all(learned(once, len(once)))
    (line,) = once.describe_left_out()
    assert f"{10 - len(once)} samples of 10 " in line
    kept = GptNeoxPack(prefix, form, 3, 20, labels=targets)
    silent = sum(not row for row in learned(kept, len(kept)))
    (line,) = kept.describe_left_out()
    assert f"{silent} samples of {len(kept)} " in line
    nothing = write(tmp_path / "n", [np.full(len(document), IGNORE_INDEX) for document in documents])
    for make in (RunningPack, GptNeoxPack):
        with pytest.raises(DataError, match="have no target"):
            make(prefix, form, 3, 5, labels=nothing)
    with pytest.raises(DataError, match="have no target"):
        OncePacked(prefix, form, 3, labels=nothing)
