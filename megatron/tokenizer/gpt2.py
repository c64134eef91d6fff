"""GPT-2's two files, `vocab.json` and `merges.txt`, read like GPT-NeoX's GPT2BPETokenizer and HFGPT2Tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from megatron.tokenizer.base import EOD_NAMES, Tokenizer, TokenizerError


class GPT2Tokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's splitting rule. `<|endoftext|>` is its only special token."""

    def __init__(self, path: Path, merges: Path | None = None) -> None:
        """`path` is vocab.json or a folder with both files; `merges` defaults to the file in the same folder."""
        vocabulary, merges = _files(path, merges)
        super().__init__(vocabulary)
        try:
            vocab = json.loads(vocabulary.read_text(encoding="utf-8"))
            pairs = _pairs(merges)
            self._tokenizer = tokenizers.Tokenizer(BPE(vocab=vocab, merges=pairs))
        except (OSError, ValueError, TypeError) as error:
            raise TokenizerError(f"{vocabulary} with {merges}: not GPT-2's vocabulary and merges ({error})") from error
        except Exception as error:  # the library raises bare Exception for merges of unknown tokens
            raise TokenizerError(
                f"{vocabulary} with {merges}: the merges do not fit the vocabulary ({error})"
            ) from error
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        self.special_tokens = {name: vocab[name] for name in EOD_NAMES if name in vocab}
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        self._names = {index: name for name, index in self.special_tokens.items()}
        self._merges = merges

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            if index in self._names:  # a special token's name is not byte-encoded
                parts += [self._tokenizer.decode(run, skip_special_tokens=False), self._names[index]]
                run = []
            else:
                run.append(index)
        return "".join([*parts, self._tokenizer.decode(run, skip_special_tokens=False)])

    @cached_property
    def fingerprint(self) -> str:
        content = self.path.read_bytes() + b"\0" + self._merges.read_bytes()
        return "sha256:" + hashlib.sha256(content).hexdigest()


def _files(path: Path, merges: Path | None) -> tuple[Path, Path]:
    """The two files; the names are GPT-2's or those of GPT-NeoX's downloads (`gpt2-vocab.json`, `gpt2-merges.txt`)."""
    if path.is_dir():
        path = path / "vocab.json"
    if not path.is_file():
        raise TokenizerError(f"vocab_file {path}: no such file; GPT-2's tokenizer reads a vocab.json and a merges.txt")
    if merges is None:
        beside = path.with_name(path.name.replace("vocab", "merges")).with_suffix(".txt")
        merges = beside if beside.is_file() else path.with_name("merges.txt")
    if not merges.is_file():
        raise TokenizerError(f"merge_file {merges}: no such file; GPT-2's tokenizer reads it with {path}")
    return path, merges


def _pairs(merges: Path) -> list[tuple[str, str]]:
    """The merges in order; the first line may contain the version. Raises ValueError for any other line."""
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not space or not left or not right or " " in right.strip():
            raise ValueError(f"{merges}, line {number}: expected two tokens, found {line!r}")
        pairs.append((left, right.rstrip("\r")))
    return pairs
