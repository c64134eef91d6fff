"""The header next to an index, `{prefix}.json`: which tokenizer and which document frame made the tokens.

The `.idx` format has no room for it. Training compares it with its own tokenizer; data without a header (made by
GPT-NeoX or Megatron) is accepted unchecked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron.common.crc import crc32
from megatron.data.indexed import HEADER, DataError, bin_path, idx_path
from megatron.tokenizer import Tokenizer

_EDGE = 1 << 20
_BLOCKS, _BLOCK = 16, 1 << 14  # of the tokens, spread over the file


class TokenizerInfo(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: str
    fingerprint: str
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        return cls(type=type(tokenizer).__name__, fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)


class ConversationCounts(BaseModel):
    """What became of a source's records. Counts of records, except `longer_than`: of conversations written."""

    model_config = ConfigDict(extra="forbid")
    records: int
    formats: dict[str, int]  # records by the format they were read as
    dropped: dict[str, int]  # by the rule that left them out
    unknown_keys: dict[str, int]  # keys that were not understood, and how many records have them
    longer_than: dict[str, int]  # tokens of a sample -> conversations that do not fit


class ChatInfo(BaseModel):
    """How conversations became tokens and labels."""

    model_config = ConfigDict(extra="forbid")
    template: str  # "llama3", or the hash of a Jinja template
    train_on: str  # "all" or "last" assistant turns
    learned_tokens: int
    counts: ConversationCounts | None = None
    template_text: str | None = None  # a Jinja template that writes such conversations
    end_of_turn: dict[str, int] = {}  # tokens that may end what the assistant says, by name


class DataHeader(BaseModel):
    """What `preprocess_data.py` knows about its output. Counts are of documents unless named otherwise."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    tokenizer: TokenizerInfo
    bos: int | None  # id put before every document, None if none
    eod: int | None  # id put after every document, None if none
    ftfy: bool
    documents: int
    tokens: int
    max_token: int
    input_bytes: int  # UTF-8 bytes of the documents' text
    empty: int  # inputs without text, left out
    skipped: int  # unreadable inputs, left out
    crc32: str  # of the .bin, hexadecimal
    sources: list[str]
    bad_files: list[str] = []  # files that could not be read and were left out, with the reason
    unknown_keys: dict[str, int] = {}  # fields of the records that were not used, and how many records have them
    chat: ChatInfo | None = None


def header_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def read_header(prefix: str | Path) -> DataHeader | None:
    """The header of a data prefix, None if there is none. Raises DataError if it is not valid."""
    path = header_path(prefix)
    if not path.is_file():
        return None
    try:
        return DataHeader.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        if holds_images(prefix):
            raise DataError(
                f"{prefix} holds images, not text; a run on them has modality: patches (docs/patches.md)"
            ) from None
        raise DataError(f"{path}: not a data header of this project: {error}") from error


def holds_images(prefix: str | Path) -> bool:
    """Whether the header says that the documents are images (`megatron.data.images`)."""
    try:
        content = json.loads(header_path(prefix).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "images" in content


def check_header(prefix: str, header: DataHeader, tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
    """Raise DataError if the data and the run disagree about the vocabulary."""
    name = header_path(prefix)
    if tokenizer is not None and header.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{name}: the data was tokenized with another tokenizer ({header.tokenizer.type}, "
            f"{header.tokenizer.vocab_size} ids, {header.tokenizer.fingerprint[:19]}) than the run's "
            f"{type(tokenizer).__name__} {tokenizer.path} ({tokenizer.vocab_size} ids, "
            f"{tokenizer.fingerprint[:19]}); preprocess the data again or correct vocab_file"
        )
    if vocab_size is not None and header.max_token >= vocab_size:
        raise DataError(f"{name}: the data holds token id {header.max_token}, the model has only {vocab_size} ids")
    size = bin_path(prefix).stat().st_size
    if header.tokens < 1 or size % header.tokens or size // header.tokens not in (1, 2, 4, 8):
        raise DataError(
            f"{name}: promises {header.tokens} tokens, {bin_path(prefix).name} has {size} bytes; "
            f"the header belongs to other data, preprocess again"
        )


def fingerprint(prefix: str | Path) -> dict[str, Any]:
    """Provenance of a data prefix for checkpoints and cache keys, in time independent of its size.

    `hash` covers the header, the sizes of both files, and the first and last MiB of the index (the last offsets depend
    on the length of every document); `content` covers some blocks of the tokens; `written` is their modification time.
    `chat` says how conversations were written, for exports.
    """
    idx, binary = idx_path(prefix), bin_path(prefix)
    for path in (idx, binary):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    sizes = (idx.stat().st_size, binary.stat().st_size)
    digest = hashlib.sha256(json.dumps(sizes).encode())
    with idx.open("rb") as file:
        digest.update(file.read(max(_EDGE, HEADER.size)))
        file.seek(max(0, sizes[0] - _EDGE))
        digest.update(file.read())
    header = header_path(prefix)
    if header.is_file():
        digest.update(header.read_bytes())
    found: dict[str, Any] = {
        "path": str(prefix),
        "idx_bytes": sizes[0],
        "bin_bytes": sizes[1],
        "hash": digest.hexdigest(),
        "content": _sample_of(binary, sizes[1]),
        "written": binary.stat().st_mtime_ns,
    }
    known = None if holds_images(prefix) else read_header(prefix)
    if known is not None and known.chat is not None and known.chat.end_of_turn:
        found["chat"] = {"template": known.chat.template_text, "end_of_turn": known.chat.end_of_turn}
    return found


def _sample_of(path: Path, size: int) -> str:
    """CRC-32 of blocks spread evenly over a file, including its end."""
    value = 0
    with path.open("rb") as file:
        for number in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
            value = crc32(file.read(_BLOCK), value)
    return f"crc32:{value:08x}"


def file_crc32(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """CRC-32 of a file as the header writes it. `progress` is called with the size of each part read."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = crc32(block, value)
            if progress is not None:
                progress(len(block))
    return f"{value:08x}"
