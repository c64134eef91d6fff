"""decode(.bin) is the input text, document by document, on real text: 2 MB here, 100 MB marked slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.corpus import real_documents
from megatron.data.indexed import IndexedFile
from megatron.tokenizer import build_tokenizer
from tests.support.data_commands import preprocess
from tests.support.text_files import write_texts

pytestmark = pytest.mark.unit

MB = 1_000_000


SIZES = [pytest.param(2 * MB, id="2MB"), pytest.param(100 * MB, id="100MB", marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_the_text(tmp_path: Path, vocab_folder: Path, size: int) -> None:
    texts = list(real_documents(size))
    source = write_texts(tmp_path / "corpus.jsonl", texts)
    assert preprocess(vocab_folder, tmp_path / "corpus", source, workers=2, prepend_bos=True, append_eod=True) == 0
    tokenizer = build_tokenizer("HFTokenizer", vocab_folder / "tokenizer.json")
    tokens = IndexedFile(tmp_path / "corpus_text_document")
    assert len(tokens) == len(texts)
    compared = 0
    for number, text in enumerate(texts):
        ids = tokens.document(number).tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eod)
        assert tokenizer.decode(ids[1:-1]) == text, f"document {number}"
        compared += len(text.encode())
    assert compared >= size
