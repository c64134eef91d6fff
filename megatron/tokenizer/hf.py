"""Hugging Face `tokenizer.json`, through the `tokenizers` library, or through tiktoken if that is equivalent.

tiktoken encodes several times as fast. It is used for byte-level BPE files with Llama 3's splitting rule whose merges
are implied by the vocabulary, such as Llama 3's own file; `equivalent_encoding` checks that. Very long texts, for which
tiktoken would run out of stack, always go through `tokenizers`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray

from megatron.tokenizer.base import Tokenizer, TokenizerError
from megatron.tokenizer.llama3 import SPLIT_PATTERN
from megatron.tokenizer.tiktoken_bpe import pieces

_DECIDES_IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")


class HFTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for any problem with the file
            raise TokenizerError(f"{path}: not a Hugging Face tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # encode their names as text, do not turn text into them
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def _derived(self) -> tuple[tiktoken.Encoding | None, str]:
        """Facts from the parsed file, which is not kept: a tiktoken encoding if one gives the same ids, and a hash."""
        content = json.loads(self._tokenizer.to_str())
        text = json.dumps({key: content.get(key) for key in _DECIDES_IDS}, sort_keys=True)
        return equivalent_encoding(content), "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def _fast(self) -> tiktoken.Encoding | None:
        return self._derived[0]

    def _takes_fast(self, text: str) -> bool:
        return next(pieces(text), "") == text

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self._encode_arrays(texts)]

    def _encode_arrays(self, texts: list[str]) -> list[NDArray[np.integer]]:
        fast = self._fast
        if fast is None:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return [
            fast.encode_to_numpy(text, disallowed_special=())
            if self._takes_fast(text)
            else np.array(self._encode(text), np.uint32)
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the parts of the file that determine ids: a copy re-saved with another post-processor has the
        same."""
        return self._derived[1]


def equivalent_encoding(content: dict[str, Any]) -> tiktoken.Encoding | None:
    """A tiktoken encoding that gives the ids of a parsed tokenizer.json, or None if it would not.

    tiktoken prefers the merge with the lowest id, `tokenizers` the merge listed first. The two agree if ids ascend in
    the order of the list and it contains every pair of tokens that forms a token.
    """
    model, split = content["model"], content["pre_tokenizer"]
    plain = (
        model["type"] == "BPE"
        and content["normalizer"] is None
        and not model.get("dropout")
        and model.get("ignore_merges")
        and not any(model.get(k) for k in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
        and not model.get("byte_fallback")
        and all(token["special"] for token in content["added_tokens"])
        and _is_llama3_split(split)
    )
    if not plain:
        return None
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    results = [vocab[a + b] for a, b in merges]
    if results != sorted(results):
        return None
    implied = sum(token[:cut] in vocab and token[cut:] in vocab for token in vocab for cut in range(1, len(token)))
    letters = {ord(letter): byte for byte, letter in byte_letters().items()}
    if implied != len(set(merges)) or not set().union(*vocab) <= set(map(chr, letters)):
        return None
    ranks = {token.translate(letters).encode("latin-1"): index for token, index in vocab.items()}
    if len(ranks) < len(vocab) or any(bytes([byte]) not in ranks for byte in range(256)):
        return None
    return tiktoken.Encoding("tokenizer.json", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def _is_llama3_split(content: dict[str, Any] | None) -> bool:
    if not content or content["type"] != "Sequence" or len(content["pretokenizers"]) != 2:
        return False
    split, byte_level = content["pretokenizers"]
    return (
        split["type"] == "Split"
        and split["pattern"] == {"Regex": SPLIT_PATTERN}
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and byte_level["type"] == "ByteLevel"
        and not byte_level["add_prefix_space"]
        and not byte_level["use_regex"]
    )


def byte_letters() -> dict[int, str]:
    """The character that represents each byte in a byte-level vocabulary: itself if it is printable in Latin-1, else
    the next unused one from U+0100 on (GPT-2's rule)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + place) for place, byte in enumerate(hidden)}
