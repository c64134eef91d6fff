"""User errors of each command: one clear message, exit code 2, no partial output."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.conversations import conversations
from tests.support.data_commands import clean, preprocess, preprocess_chats
from tests.support.text_files import BAD_FILES, BAD_LINES, write_bad_file, write_records, write_texts
from tools.datasets.inspect_data import main as inspect

pytestmark = pytest.mark.unit

TOOLS: dict[str, Callable[[Path, Path, Path], int]] = {
    "preprocess_data": lambda vocab, out, source: preprocess(vocab, out / "x", source),
    "preprocess_sft": lambda vocab, out, source: preprocess_chats(vocab, out / "x", f"a={source}"),
    "clean_corpus": lambda _, out, source: clean(out / "x.jsonl", source),
}
SFT_FILES = {"no column": "no conversation", "latin-1": "not UTF-8", "no text at all": "no conversation"}
CLEAN_FILES = {"no text at all": "nothing is left: 1 documents"}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("tool", TOOLS)
def test_bad_files(
    tool: str, kind: str, vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    source = write_bad_file(kind, tmp_path / "in")
    assert TOOLS[tool](vocab_folder, tmp_path / "out", source) == 2
    message = capsys.readouterr().err
    special = {"preprocess_sft": SFT_FILES, "clean_corpus": CLEAN_FILES}.get(tool, {})
    assert special.get(kind, BAD_FILES[kind]) in message
    assert message.startswith(f"{tool}.py: ")
    assert "Traceback" not in message
    assert kind == "no text at all" or str(source) in message
    assert not files(tmp_path / "out")


SFT_LINES: dict[str, Any] = {
    "turn 1: the role 'narrator' does not exist": [{"role": "narrator", "content": "Once"}],
    "the first turn is the assistant's": [{"role": "assistant", "content": "I begin"}],
    "turn 1: the user says nothing": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}],
    "turn 1: the role ['user'] does not exist": [{"role": ["user"], "content": "x"}],
    "the conversation is empty": [],
    "turn 2: the assistant says nothing": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}],
    "turn 2: the content is not text but int": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}],
    "turn 1: expected an object": ["hello"],
    "a system turn is not the first turn": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
}


@pytest.mark.parametrize("message", SFT_LINES)
def test_bad_conversations(
    message: str, vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = conversations(2, "stars")
    source = write_records(tmp_path / "in.jsonl", [good[0], {"messages": SFT_LINES[message]}, good[1]])
    assert preprocess_chats(vocab_folder, tmp_path / "out" / "x", f"a={source}") == 2
    error = capsys.readouterr().err
    assert f"{source}, line 2: " in error
    assert message in error
    assert not files(tmp_path / "out")
    assert preprocess_chats(vocab_folder, tmp_path / "out" / "x", f"a={source}", on_bad_record="skip") == 0
    error = capsys.readouterr().err
    assert f"skipped: {source}, line 2: " in error
    assert "2 documents" in error


@pytest.mark.parametrize("line", [line for line in BAD_LINES if b"text" not in line or line.endswith(b'"a"')])
def test_bad_lines_of_conversations(
    line: bytes, vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(json.dumps(conversations(1, "x")[0]).encode() + b"\n\n" + line + b"\n")
    assert preprocess_chats(vocab_folder, tmp_path / "out" / "x", f"a={tmp_path / 'in.jsonl'}") == 2
    assert "in.jsonl, line 3: " in capsys.readouterr().err
    assert not files(tmp_path / "out")


def test_long_conversations_and_nul_bytes(vocab_folder: Path, tmp_path: Path) -> None:
    record = conversations(1, "x\x00y")[0] | {"notes": "z" * 10_000_000}
    source = write_records(tmp_path / "in.jsonl", [record])
    assert preprocess_chats(vocab_folder, tmp_path / "x", f"a={source}") == 0


@pytest.mark.parametrize("damage", ["no bin", "no idx", "cut bin", "cut idx", "no index at all", "empty idx"])
def test_inspect_names_what_is_damaged(
    damage: str, vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess(vocab_folder, tmp_path / "c", write_texts(tmp_path / "c.jsonl", ["a", "b"])) == 0
    prefix = tmp_path / "c_text_document"
    ending = damage.split()[-1] if damage != "no index at all" else "idx"
    path = Path(f"{prefix}.{ending}")
    if damage.startswith("no"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage.startswith("cut") else b"")
    capsys.readouterr()
    assert inspect([str(prefix)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("inspect_data.py: ")
    assert str(path) in error


def test_inspect_refuses_another_tokenizer(
    vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess(vocab_folder, tmp_path / "c", write_texts(tmp_path / "c.jsonl", ["a", "b"])) == 0
    assert inspect([str(tmp_path / "c_text_document"), "--vocab-file", str(vocab_folder / "spm.model")]) == 2
    other = ["--tokenizer-type", "SPMTokenizer", "--vocab-file", str(vocab_folder / "spm.model")]
    assert inspect([str(tmp_path / "c_text_document"), *other]) == 2
    assert "tokenized with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS)
def test_an_output_folder_that_is_a_file(
    tool: str, vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_records(tmp_path / "in.jsonl", [{"text": "words", **conversations(1, "x")[0]}])
    (tmp_path / "out").write_text("a file")
    assert TOOLS[tool](vocab_folder, tmp_path / "out", source) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file"


BAD_TEMPLATES: dict[str, tuple[str, bytes]] = {
    "not JSON": ("t.json", b'{"chat_template": '),
    "not UTF-8 text": ("t.jinja", "{{ 'é' }}".encode("latin-1")),
    "not valid Jinja": ("t.jinja", b"{% for %}"),
    "no chat_template": ("tokenizer_config.json", b"{}"),
    "the chat template refuses the conversation": ("t.jinja", b"{{ messages.no.such }}"),
    "the chat template refuses": ("t.jinja", b"{{ 1 // 0 }}"),
    "no such file": ("absent.jinja", b""),
}


@pytest.mark.parametrize("message", BAD_TEMPLATES)
def test_bad_templates(message: str, vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content = BAD_TEMPLATES[message]
    if content:
        (tmp_path / name).write_bytes(content)
    source = write_records(tmp_path / "in.jsonl", conversations(2, "stars"))
    template = str(tmp_path / name)
    assert preprocess_chats(vocab_folder, tmp_path / "out/x", f"a={source}", chat_template=template) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("preprocess_sft.py: ")
    assert not files(tmp_path / "out")
