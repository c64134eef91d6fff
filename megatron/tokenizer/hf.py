"""Hugging Face `tokenizer.json`, through the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from megatron.tokenizer.base import Tokenizer, TokenizerError

_DECIDES_IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")


class HFTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise TokenizerError(f"{path}: not a Hugging Face tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # encode their names as text, do not turn text into them
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """Over the parts of the file that decide ids: a copy re-saved with another post-processor is the same."""
        content = json.loads(self._tokenizer.to_str())
        text = json.dumps({key: content.get(key) for key in _DECIDES_IDS}, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
