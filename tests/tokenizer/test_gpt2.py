"""GPT-2's two files: ids equal those of `transformers`, and unusable files are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from megatron.tokenizer import TokenizerError, build_tokenizer, vocabulary_size

pytestmark = pytest.mark.unit

TEXTS = [
    "Stars that don't shine: 1,234 of them,  two spaces.",
    "  leading, trailing  ",
    "Zürich 東京 \U0001f30c \u200b\x07",
    "line\r\nline\n\n\tTab 'll we've",
    "it quotes <|endoftext|> as text",
    "",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary in GPT-2's form, trained by `tokenizers`."""
    folder = tmp_path_factory.mktemp("gpt2")
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        [*TEXTS, "the star and the galaxy " * 50], vocab_size=360, special_tokens=["<|endoftext|>"]
    )
    trainer.save_model(str(folder))
    return folder


@pytest.mark.parametrize("name", ["GPT2BPETokenizer", "HFGPT2Tokenizer"])
def test_ids_equal_transformers(files: Path, name: str) -> None:
    from transformers import GPT2Tokenizer as Theirs

    ours = build_tokenizer(name, files)
    theirs = Theirs(vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"))
    texts = [text for text in TEXTS if "<|" not in text]  # transformers turns the name into the token
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert (ours.vocab_size, ours.eod, ours.bos) == (len(theirs), theirs.eos_token_id, None)


def test_text_comes_back_and_names_stay_text(files: Path) -> None:
    tokenizer = build_tokenizer("GPT2BPETokenizer", files)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert tokenizer.eod not in tokenizer.encode("it quotes <|endoftext|> as text")
    ids = [*tokenizer.encode("a star"), tokenizer.eod, *tokenizer.encode("é")]
    assert tokenizer.decode(ids) == "a star<|endoftext|>é"


def test_files_are_found_by_gpt_neox_names(files: Path, tmp_path: Path) -> None:
    """`data/gpt2-vocab.json` and `data/gpt2-merges.txt`, as its download names them."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / f"gpt2-{name}").write_bytes((files / name).read_bytes())
    renamed = build_tokenizer("GPT2BPETokenizer", tmp_path / "gpt2-vocab.json")
    assert renamed.encode(TEXTS[0]) == build_tokenizer("GPT2BPETokenizer", files).encode(TEXTS[0])
    other = tmp_path / "m.txt"
    other.write_text("#version: 0.2\n")
    without_merges = build_tokenizer("GPT2BPETokenizer", files / "vocab.json", other)
    assert without_merges.fingerprint != renamed.fingerprint
    assert len(without_merges.encode(TEXTS[0])) > len(renamed.encode(TEXTS[0]))
    assert vocabulary_size("GPT2BPETokenizer", files) == renamed.vocab_size


def test_files_that_cannot_be_used_are_named(files: Path, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.json"
    vocab.write_bytes((files / "vocab.json").read_bytes())
    with pytest.raises(TokenizerError, match=r"merge_file .*merges\.txt: no such file"):
        build_tokenizer("GPT2BPETokenizer", vocab)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(TokenizerError, match="line 1: expected two tokens, found 'a b c'"):
        build_tokenizer("GPT2BPETokenizer", vocab)
    (tmp_path / "merges.txt").write_text("unheard of\n")
    with pytest.raises(TokenizerError, match="the merges do not fit the vocabulary"):
        build_tokenizer("GPT2BPETokenizer", vocab)
    vocab.write_text("[")
    with pytest.raises(TokenizerError, match="not GPT-2's vocabulary and merges"):
        build_tokenizer("GPT2BPETokenizer", vocab)
    vocab.write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(TokenizerError, match="no end-of-document token"):
        build_tokenizer("GPT2BPETokenizer", vocab)
