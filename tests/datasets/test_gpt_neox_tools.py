"""Data tools with GPT-NeoX's flags: conversations, merging, counting. Ids and text come from `transformers`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.common.labels import IGNORE_INDEX
from megatron.data.header import ChatInfo, DataHeader, TokenizerInfo, file_crc32, read_header
from megatron.data.indexed import IndexedFile, IndexedWriter, bin_path
from tools.datasets import dataset_token_count, merge_datasets
from tools.datasets import preprocess_data_with_chat_template as chats

pytestmark = pytest.mark.unit

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CONVERSATIONS = [
    [("user", "Name a star."), ("assistant", "Vega."), ("user", "Another?"), ("assistant", "Deneb, in Cygnus.")],
    [("system", "Be brief."), ("user", "Zürich? 東京?"), ("assistant", "Cities.")],
    [("user", "and it ends with a question")],
]


def turns(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in conversation]


@pytest.fixture(scope="module")
def folder(vocab_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer folder, and conversations."""
    made = tmp_path_factory.mktemp("chat")
    shutil.copy(vocab_folder / "tokenizer.json", made)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|end_of_text|>", "__type": "AddedToken"},
        "chat_template": TEMPLATE,
    }
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    records = [{"messages": turns(c), "id": number} for number, c in enumerate(CONVERSATIONS)]
    (made / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


def run(folder: Path, out: Path, *flags: str, source: str = "in.jsonl") -> int:
    places = ["--input", str(folder / source), "--output-prefix", str(out), "--tokenizer-path", str(folder)]
    return chats.main([*places, "--jsonl-keys", "messages", *flags])


def expected(folder: Path, conversation: list[tuple[str, str]], only_last: bool = False) -> tuple[list[int], list[int]]:
    """Ids of `transformers` for the whole conversation, and for each assistant turn beyond its prompt."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def ids(count: int, prompt: bool = False) -> list[int]:
        given = turns(conversation)[:count]
        text = tokenizer.apply_chat_template(given, add_generation_prompt=prompt, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = ids(len(conversation))
    labels = [IGNORE_INDEX] * len(whole)
    for place, (role, _) in enumerate(conversation):
        last = place == len(conversation) - 1
        if role == "assistant" and (last or not only_last):
            begin, end = len(ids(place, prompt=True)), len(ids(place + 1))
            labels[begin:end] = whole[begin:end]
    ends_learned = conversation[-1][0] == "assistant"
    eos = tokenizer.eos_token_id
    return [*whole, eos], [*labels, eos if ends_learned else IGNORE_INDEX]


@pytest.mark.parametrize(("flags", "only_last"), [((), False), (("--only-last", "--workers", "2"), True)])
def test_ids_and_labels_equal_transformers(
    folder: Path, tmp_path: Path, flags: tuple[str, ...], only_last: bool
) -> None:
    assert run(folder, tmp_path / "sft", *flags) == 0
    text, labels = (IndexedFile(str(tmp_path / f"sft_messages{kind}_document")) for kind in ("", "_label"))
    assert text.dtype == labels.dtype == np.int32
    for number, conversation in enumerate(CONVERSATIONS):
        ids, wanted = expected(folder, conversation, only_last)
        assert text.document(number).tolist() == ids
        assert labels.document(number).tolist() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"sft_messages{kind}_document.{suffix}" for kind in ("", "_label") for suffix in ("bin", "idx")
    ]


def test_without_a_mask_there_are_no_labels(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "all", "--no-mask") == 0
    ids, _ = expected(folder, CONVERSATIONS[0])
    assert IndexedFile(str(tmp_path / "all_messages_document")).document(0).tolist() == ids[:-1]
    assert not (tmp_path / "all_messages_label_document.bin").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": "hello"}', "line.jsonl:2: expected a list of turns with role and content, found str"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "turn 1: expected an object with role and content"),
        ('{"chat": []}', "line.jsonl:2: no field messages; the fields are chat"),
        ('{"messages": [', "line.jsonl:2: Expecting value"),
        (
            '{"messages": [{"role": "user", "content": "a <|eot_id|> b"}]}',
            "turn 1 quotes <|eot_id|>, which would become",
        ),
        ("[]", "expected an object, found list"),
    ],
)
def test_a_bad_line_is_reported_and_leaves_no_output(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    good = json.dumps({"messages": turns(CONVERSATIONS[0])})
    (tmp_path / "line.jsonl").write_text(f"{good}\n{line}\n")
    out = tmp_path / "out"
    assert run(folder, out / "sft", source=str(tmp_path / "line.jsonl")) == 2
    assert message in capsys.readouterr().err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("flags", [("--for-rm",), ("--reward-key", "score"), ("--binary-reward",)])
def test_rewards_are_refused(folder: Path, tmp_path: Path, capsys: Any, flags: tuple[str, ...]) -> None:
    assert run(folder, tmp_path / "sft", *flags) == 2
    assert "reward models and their data are not supported" in capsys.readouterr().err


# --- merging and counting


def pair(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> list[list[int]]:
    writer = IndexedWriter(prefix, np.dtype(dtype))
    for document in documents:
        writer.add(np.array(document))
    writer.finish()
    return documents


def test_pairs_are_merged_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_datasets, "CHUNK", 2)
    (tmp_path / "in").mkdir()
    b = pair(tmp_path / "in" / "b", [[7], [], [8, 9], [10], [11, 12]])
    a = pair(tmp_path / "in" / "a", [[1, 2, 3], [4]])
    assert merge_datasets.main(["--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "out/all")]) == 0
    merged = IndexedFile(str(tmp_path / "out/all"))
    assert [document.tolist() for document in merged] == [*a, *b]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["all.bin", "all.idx"]


def _header(tokens: int, **changes: Any) -> DataHeader:
    tokenizer = TokenizerInfo(type="HFTokenizer", fingerprint="f", vocab_size=100)
    counts = {"documents": 2, "tokens": tokens, "max_token": tokens, "input_bytes": 9, "empty": 1, "skipped": 0}
    frame = {"bos": None, "eod": 3, "ftfy": False, "crc32": "00000000", "sources": ["x"], "unknown_keys": {"url": 2}}
    return DataHeader(**{"tokenizer": tokenizer, **counts, **frame, **changes})


def test_headers_are_added_up_and_must_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out/all"
    command = ["--input", str(source), "--output-prefix", str(out)]
    source.mkdir()
    for name, documents in (("a", [[1, 2], [4]]), ("b", [[5], [6]])):
        pair(source / name, documents)
    chat = ChatInfo(template="llama3", train_on="all", learned_tokens=2)
    for name, tokens in (("a", 3), ("b", 2)):
        (source / f"{name}.json").write_text(_header(tokens, chat=chat).model_dump_json())
    assert merge_datasets.main(command) == 0
    header = read_header(out)
    assert header is not None
    assert (header.documents, header.tokens, header.max_token, header.empty) == (4, 5, 3, 2)
    assert (header.sources, header.unknown_keys, header.crc32) == (["x", "x"], {"url": 4}, file_crc32(bin_path(out)))
    assert header.chat is not None
    assert header.chat.learned_tokens == 4
    other = TokenizerInfo(type="HFTokenizer", fingerprint="g", vocab_size=100)
    for header in (_header(2, chat=chat, tokenizer=other), _header(2), _header(2, chat=chat, eod=None)):
        (source / "b.json").write_text(header.model_dump_json())
        assert merge_datasets.main(command) == 2
    (source / "b.json").unlink()
    assert merge_datasets.main(command) == 2
    assert capsys.readouterr().err.count("they do not belong in one file; preprocess them alike") == 4


def test_unmergeable_pairs_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", ["--output-prefix", str(tmp_path / "out/all")]
    assert merge_datasets.main(["--input", str(source), *out]) == 2
    source.mkdir()
    assert merge_datasets.main(["--input", str(source), *out]) == 2
    pair(source / "a", [[1]])
    pair(source / "b", [[70000]], np.int32)
    assert merge_datasets.main(["--input", str(source), *out]) == 2
    (source / "b.idx").unlink()
    assert merge_datasets.main(["--input", str(source), *out]) == 2
    said = capsys.readouterr().err.splitlines()
    words = ("no such folder", "no .bin/.idx pair in it", "holds int32", "one of .bin and .idx is missing")
    assert [word in line for word, line in zip(words, said, strict=True)] == [True] * 4
    assert not (tmp_path / "out").exists()


def test_counting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path / "a", [[1, 2, 3], [4]])
    assert dataset_token_count.main([str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:2] == [f"Checking file {tmp_path}/a", "Dataset size in tokens is 4"]
    assert "none" in captured.err
    assert dataset_token_count.main([]) == 2
