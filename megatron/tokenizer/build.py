"""From the YAML keys `tokenizer_type` and `vocab_file` to a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron.tokenizer.base import Tokenizer, TokenizerError


def _hf(path: Path, merges: Path | None) -> Tokenizer:
    from megatron.tokenizer.hf import HFTokenizer

    return HFTokenizer(path)


def _tiktoken(path: Path, merges: Path | None) -> Tokenizer:
    from megatron.tokenizer.tiktoken_bpe import TiktokenTokenizer

    return TiktokenTokenizer(path)


def _spm(path: Path, merges: Path | None) -> Tokenizer:
    from megatron.tokenizer.spm import SPMTokenizer

    return SPMTokenizer(path)


def _gpt2(path: Path, merges: Path | None) -> Tokenizer:
    from megatron.tokenizer.gpt2 import GPT2Tokenizer

    return GPT2Tokenizer(path, merges)


_BUILDERS: dict[str, tuple[Callable[[Path, Path | None], Tokenizer], str]] = {
    "HFTokenizer": (_hf, "tokenizer.json"),
    "TiktokenTokenizer": (_tiktoken, "tokenizer.model"),
    "SPMTokenizer": (_spm, "tokenizer.model"),
    "GPT2BPETokenizer": (_gpt2, "vocab.json"),
    "HFGPT2Tokenizer": (_gpt2, "vocab.json"),
}
TOKENIZER_TYPES = tuple(_BUILDERS)


def build_tokenizer(tokenizer_type: str, vocab_file: str | Path, merge_file: str | Path | None = None) -> Tokenizer:
    """The tokenizer of `vocab_file`, a file or the model folder that contains it under its usual name.

    `merge_file` is read by GPT-2's tokenizers only. Raises TokenizerError for an unknown type, a missing or unreadable
    file, and a vocabulary without an end-of-document token.
    """
    tokenizer = _open(tokenizer_type, vocab_file, merge_file)
    _ = tokenizer.eod  # a vocabulary without it is refused here, not in the middle of a corpus
    return tokenizer


def vocabulary_size(tokenizer_type: str, vocab_file: str | Path, merge_file: str | Path | None = None) -> int:
    """Highest id + 1 of the tokenizer; raises TokenizerError for a type or file that cannot be used."""
    return _open(tokenizer_type, vocab_file, merge_file).vocab_size


def _open(tokenizer_type: str, vocab_file: str | Path, merge_file: str | Path | None) -> Tokenizer:
    if tokenizer_type not in _BUILDERS:
        raise TokenizerError(f"tokenizer_type {tokenizer_type!r} is not supported; use one of {', '.join(_BUILDERS)}")
    build, usual_name = _BUILDERS[tokenizer_type]
    path = Path(vocab_file)
    if path.is_dir():
        path = path / usual_name
    if not path.is_file():
        raise TokenizerError(f"vocab_file {path}: no such file; {tokenizer_type} reads a {usual_name}")
    return build(path, None if merge_file is None else Path(merge_file))
