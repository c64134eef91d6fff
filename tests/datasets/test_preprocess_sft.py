"""preprocess_sft.py: tokens and labels, removal of duplicates, and the run described by its YAML."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron.common.labels import IGNORE_INDEX
from megatron.data.build import build_datasets
from megatron.data.header import read_header
from megatron.data.indexed import IndexedFile
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import Llama3Chat
from tests.support.configurations import data_args
from tests.support.conversations import conversations
from tests.support.data_commands import preprocess_chats, table_rows
from tests.support.text_files import file_digests, write_records
from tests.support.vocabulary import encode_chat
from tools.datasets.encoding import records
from tools.datasets.encoding.conversations import read_conversation

pytestmark = pytest.mark.unit


def test_tokens_and_labels(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = conversations(30, "stars")
    source = write_records(tmp_path / "a.jsonl", records)
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"stars={source}") == 0
    text, labels = IndexedFile(tmp_path / "sft_stars_document"), IndexedFile(tmp_path / "sft_stars_label_document")
    learned = 0
    for i, record in enumerate(records):
        messages = read_conversation(record, False).conversation.messages
        ids, targets = encode_chat(Llama3Chat(hf_tokenizer), hf_tokenizer, messages)
        assert text.document(i).tolist() == ids
        assert labels.document(i).tolist() == targets
        kept = [t for t in targets if t != IGNORE_INDEX]
        learned += len(kept)
        expected = "".join(f"{m.content}<|eot_id|>" for m in messages if m.role == "assistant")
        assert hf_tokenizer.decode(kept) == expected
    header = read_header(tmp_path / "sft_stars_document")
    assert header is not None
    assert header.chat is not None
    assert (header.chat.template, header.chat.train_on, header.chat.learned_tokens) == ("llama3", "all", learned)
    assert labels.dtype == np.int32


def test_train_on_last_and_workers_make_no_difference(
    vocab_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK_BYTES", 1 << 14)
    source = write_records(tmp_path / "a.jsonl", conversations(500, "stars"))
    assert source.stat().st_size > 6 * records.BLOCK_BYTES
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        assert preprocess_chats(vocab_folder, folder / "sft", f"s={source}", workers=workers, train_on="last") == 0
        (folder / "sft_train.yml").unlink()  # has the paths in it
    assert file_digests(tmp_path / "1") == file_digests(tmp_path / "3")
    labels = IndexedFile(tmp_path / "1" / "sft_s_label_document").document(3)
    assert 2 < (labels != IGNORE_INDEX).sum() < 8


def test_duplicates_are_left_out_across_sources(
    vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = conversations(20, "stars")
    share_gpt = [
        {
            "conversations": [{"from": "system", "value": "Other system prompt"}]
            + [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in r["messages"]]
        }
        for r in records[10:]
    ]
    a = write_records(tmp_path / "a.jsonl", [*records, *records[:5]])
    b = write_records(tmp_path / "b.jsonl", [*share_gpt, *conversations(7, "dust")])
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a:0.75={a}", f"b:0.25={b}") == 0
    assert len(IndexedFile(tmp_path / "sft_a_document")) == 20
    assert len(IndexedFile(tmp_path / "sft_b_document")) == 7
    rows = table_rows(capsys.readouterr().out)
    assert rows["a", "dropped: duplicate"] == "5"
    assert rows["b", "dropped: duplicate"] == "10"


def test_the_written_keys_train_on_the_mix(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    a = write_records(tmp_path / "a.jsonl", conversations(60, "stars"))
    b = write_records(tmp_path / "b.jsonl", conversations(60, "dust"))
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a:0.75={a}", f"b:0.25={b}") == 0
    keys = yaml.safe_load((tmp_path / "sft_train.yml").read_text())
    args = data_args(**keys, vocab_file=str(vocab_folder), seq_length=200)
    datasets = build_datasets(args)
    assert "75.00% of the run" in datasets.notes[0]
    starts, ends = 0, 0
    for i in range(len(datasets.train)):
        sample = datasets.train[i]
        tokens, labels, positions = (sample[key] for key in ("tokens", "labels", "positions"))
        learned = labels != IGNORE_INDEX
        assert learned.any()
        # one BOS per conversation, at its start; never a target
        assert (tokens[positions == 0] != hf_tokenizer.bos).sum() <= 1  # padding is a document of its own
        assert not (labels == hf_tokenizer.bos).any()
        starts += int((tokens == hf_tokenizer.bos).sum())
        ends += int((labels == hf_tokenizer.token_id("<|eot_id|>")).sum())
    assert ends == 2 * starts  # whole conversations: both of its answers end


def test_bad_records_and_arguments(vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"messages": [{"role": "assistant", "content": "I begin"}]}
    source = write_records(tmp_path / "a.jsonl", [conversations(1, "x")[0], bad])
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}") == 2
    assert f"{source}, line 2: the first turn is the assistant's" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}", on_bad_record="skip") == 0
    header = read_header(tmp_path / "sft_a_document")
    assert header is not None
    assert header.skipped == 1
    for entries, message in (
        (["nonsense"], "expected NAME=FILES"),
        ([f"a:x={source}"], "expected NAME=FILES"),
        ([f"a:1.1.1={source}"], "is not a number"),
        ([f"a={source}", f"a={source}"], "is given twice"),
        ([f"a={source}", f"b={source}"], "is given twice"),
        (["a=absent.jsonl"], "no such file"),
    ):
        assert preprocess_chats(vocab_folder, tmp_path / "out", *entries) == 2
        assert message in capsys.readouterr().err
    other = write_records(tmp_path / "b.jsonl", conversations(1, "y"))
    assert preprocess_chats(vocab_folder, tmp_path / "out", f"a:0.5={source}", f"b={other}") == 2
    assert "shares to all sources or to none" in capsys.readouterr().err
    only_user = write_records(tmp_path / "u.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    assert preprocess_chats(vocab_folder, tmp_path / "out", f"u={only_user}") == 2
    assert "nothing to learn" in capsys.readouterr().err
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    assert preprocess_chats(vocab_folder, tmp_path / "out", f"b={other}", chat_template=str(template)) == 2
    assert "the chat template" in capsys.readouterr().err
