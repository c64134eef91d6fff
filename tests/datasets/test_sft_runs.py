"""Conversations in a run are whole and labeled, and everything skipped is counted in visible output."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron.common.labels import IGNORE_INDEX
from megatron.data.build import build_datasets
from megatron.data.indexed import DataError, IndexedFile
from tests.support.configurations import data_args
from tests.support.conversations import conversations
from tests.support.data_commands import preprocess_chats, table_rows
from tests.support.text_files import write_records
from tools.datasets.build_indices import main as build_indices
from tools.datasets.inspect_data import main as inspect

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 64


@pytest.fixture
def prefix(vocab_folder: Path, tmp_path: Path) -> str:
    """Conversations, every third longer than a sample, and two without a target."""
    records = conversations(30, "stars")
    for record in records[::3]:
        record["messages"][0]["content"] += " and on and on" * 30
    for record in records[1:6:3]:
        for turn in record["messages"]:
            turn["weight"] = 0
    source = write_records(tmp_path / "a.jsonl", [*records, records[0]])
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}", seq_length=SAMPLE) == 0
    return str(tmp_path / "sft_a_document")


def args(prefix: str, **changes: Any) -> Any:
    keys = {
        "train_data_paths": [prefix],
        "train_label_data_paths": [prefix.replace("_document", "_label_document")],
        "pack_impl": "best_fit",
        "seq_length": SAMPLE,
    }
    return data_args(**{**keys, **changes})


def test_the_table_at_the_end_and_in_inspect_data(
    prefix: str, vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.jsonl"
    assert preprocess_chats(vocab_folder, tmp_path / "again", f"a={source}", seq_length=SAMPLE) == 0
    rows = {what: number for (_, what), number in table_rows(capsys.readouterr().out).items()}
    text = IndexedFile(prefix)
    labels = IndexedFile(prefix.replace("_document", "_label_document"))
    learned = sum(int((document != IGNORE_INDEX).sum()) for document in labels)
    long = int((text.sizes > SAMPLE + 1).sum())
    assert 0 < long < 28
    assert rows == {
        "records read": "31",
        "format messages": "31",
        "dropped: duplicate": "1",
        "dropped: nothing to learn": "2",
        "conversations written": "28",
        "tokens": f"{text.num_tokens:,}",
        "learned tokens": f"{learned:,} ({learned / text.num_tokens:.1%})",
        f"longer than a sample of {SAMPLE} tokens": f"{long} ({long / 28:.1%})",
    }
    assert inspect([prefix, "--seq-length", str(SAMPLE)]) == 0
    out = capsys.readouterr().out
    assert {what: number for (_, what), number in table_rows(out).items()} == rows
    assert f"longer than a sample of {SAMPLE} tokens: {long} of 28 documents ({long / 28:.1%})" in out


def test_conversations_are_cut_only_on_request_and_counted(prefix: str) -> None:
    sizes = IndexedFile(prefix).sizes
    long = sizes > SAMPLE + 1
    datasets = build_datasets(args(prefix))
    notes = [note for note in datasets.notes if "longer than a sample" in note]
    share = sizes[long].sum() / sizes.sum()
    assert notes == [
        f"train: {prefix}: {long.sum()} documents of 28 ({share:.2%} of the tokens) longer than a sample of {SAMPLE} "
        f"tokens and left out; allow_chopped: true cuts them"
    ]
    samples = [datasets.train[i]["labels"] for i in range(len(datasets.train))]
    assert all((labels != IGNORE_INDEX).any() for labels in samples)
    cut = build_datasets(args(prefix, allow_chopped=True))
    assert any("and cut" in note for note in cut.notes)
    assert any("no target in them" in note for note in cut.notes)
    assert all((cut.train[i]["labels"] != IGNORE_INDEX).any() for i in range(len(cut.train)))


def test_conversations_without_labels_and_cut_ones_are_refused(prefix: str) -> None:
    for changes in (
        {"train_label_data_paths": None},
        {"train_label_data_paths": None, "train_data_paths": None, "data_path": prefix, "split": "8,1,1"},
        {"valid_data_paths": [prefix]},
    ):
        with pytest.raises(DataError, match=r"holds conversations.*give its label file, .*sft_a_label_document"):
            build_datasets(args(prefix, **changes))
    with pytest.raises(DataError, match=r"pack_impl: packed cuts them.*Set pack_impl: best_fit"):
        build_datasets(args(prefix, pack_impl="packed"))
    packed = build_datasets(args(prefix, pack_impl="packed", allow_chopped=True))
    assert len(packed.train) == 160
    (note,) = [note for note in packed.notes if "no target in them" in note]
    found = re.search(r"([\d,]+) samples of ([\d,]+) ", note)
    assert found is not None
    silent, count = (int(number.replace(",", "")) for number in found.groups())
    assert packed.blend is not None
    order = packed.blend.sources[0]._index.arrays()["order"]  # type: ignore[attr-defined]
    labels = IndexedFile(prefix.replace("_document", "_label_document"))
    stream = np.concatenate([np.array(labels.document(int(number))) for number in order[:2].reshape(-1)])
    taught = [(stream[start * SAMPLE + 1 : (start + 1) * SAMPLE + 1] >= 0).any() for start in range(count)]
    assert 0 < silent == taught.count(False)
    assert all((packed.train[i]["labels"] != IGNORE_INDEX).any() for i in range(len(packed.train)))


def test_switches_of_turns_and_train_on_last(vocab_folder: Path, tmp_path: Path) -> None:
    """Switches in the record take precedence over --train-on, which applies if there are none."""
    records = [{"messages": [dict(turn) for turn in r["messages"]]} for r in conversations(3, "dust")]
    records[0]["messages"][1]["weight"] = 1
    records[1]["messages"][3]["train"] = False
    records[1]["messages"][1]["train"] = True
    source = write_records(tmp_path / "b.jsonl", records)
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"b={source}", train_on="last") == 0
    labels = IndexedFile(tmp_path / "sft_b_label_document")
    spans = [int(np.diff((document != IGNORE_INDEX).astype(int)).clip(0).sum()) for document in labels]
    assert spans == [2, 1, 1]


def test_the_written_keys_through_the_command(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = yaml.safe_load((ROOT / "configs/tiny/run.yml").read_text())
    keys = {key: run[key] for key in ("optimizer", "train_iters", "precision") if key in run} | {
        "from_scratch": True,
        "seq_length": SAMPLE,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    (tmp_path / "run.yml").write_text(yaml.safe_dump(keys))
    data = tmp_path / "sft_train.yml"
    command = [str(ROOT / "configs/tiny/model.yml"), str(tmp_path / "run.yml"), str(data), "--world-size", "1"]
    capsys.readouterr()
    assert build_indices([*command, "--check-content"]) == 0
    out = capsys.readouterr().out
    assert f"longer than a sample of {SAMPLE} tokens and left out" in out
    assert "2 sources ready" in out
    lines = data.read_text().splitlines()
    data.write_text("\n".join(line for line in lines if "label" not in line))
    assert build_indices(command) == 2
    assert "give its label file" in capsys.readouterr().err
    data.write_text("\n".join(line for line in lines if "pack_impl" not in line))
    assert build_indices(command) == 2
    assert "answers would stand without their question" in capsys.readouterr().err
