"""inspect_data.py shows the content, and marks exactly the learned tokens."""

from pathlib import Path

import pytest

from megatron.tokenizer import Tokenizer
from tests.support.conversations import conversations
from tests.support.data_commands import preprocess, preprocess_chats
from tests.support.text_files import write_records, write_texts
from tests.support.vocabulary import real_texts
from tools.datasets.inspect_data import main

pytestmark = pytest.mark.unit


def test_counts_lengths_and_text(
    vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = real_texts()[:30]
    assert preprocess(vocab_folder, tmp_path / "c", write_texts(tmp_path / "c.jsonl", texts), prepend_bos=True) == 0
    capsys.readouterr()
    prefix = str(tmp_path / "c_text_document")
    picture = tmp_path / "lengths.png"
    arguments = ["--vocab-file", str(vocab_folder), "--document", "7", "--histogram", str(picture), "--max-chars", "0"]
    assert main([prefix, *arguments]) == 0
    out = capsys.readouterr().out
    tokens = sum(len(hf_tokenizer.encode(text)) + 1 for text in texts)
    assert f"30 documents, {tokens} tokens as uint16" in out
    assert f"BOS {hf_tokenizer.bos}, EOD None" in out
    assert out.endswith(f"<|begin_of_text|>{texts[7]}\n")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main([prefix]) == 0
    assert "--- document" not in capsys.readouterr().out
    assert main([prefix, "--vocab-file", str(vocab_folder), "--samples", "2", "--max-chars", "50"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- document") == 2
    assert " ..." in out


def test_the_mask_is_marked(vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_records(tmp_path / "a.jsonl", conversations(5, "stars"))
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}") == 0
    capsys.readouterr()
    arguments = [str(tmp_path / "sft_a_document"), "--vocab-file", str(vocab_folder), "--document", "1", "--show-mask"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "0 documents have no learned token" in out
    assert out.endswith(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQuestion 1 about stars?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Answer 1. Answer 1. <|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nMore?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[More 1.<|eot_id|>]]\n"
    )
    assert main([*arguments, "--color", "always"]) == 0
    assert "\x1b[32mMore 1.<|eot_id|>\x1b[0m" in capsys.readouterr().out


def test_mistakes(vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess(vocab_folder, tmp_path / "c", write_texts(tmp_path / "c.jsonl", ["a", "b"])) == 0
    prefix = str(tmp_path / "c_text_document")
    for arguments, message in (
        ([str(tmp_path / "absent")], "no such file"),
        ([prefix, "--document", "0"], "give --vocab-file"),
        ([prefix, "--vocab-file", str(vocab_folder), "--document", "2"], "has documents 0 to 1"),
        ([prefix, "--vocab-file", str(vocab_folder), "--show-mask"], "c_text_label_document.idx: no such file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
