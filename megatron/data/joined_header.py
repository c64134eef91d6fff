"""The header of several data sets that are written one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron.data.header import ChatInfo, ConversationCounts, DataHeader
from megatron.data.indexed import DataError

# Fields that must be equal, because one model reads all the documents.
_ALIKE = ("tokenizer", "bos", "eod", "ftfy")


def joined_header(parts: Sequence[tuple[str, DataHeader | None]], crc32: str) -> DataHeader | None:
    """The header of the documents of all `parts` (prefix, header); None if none of them has one.

    DataError names two parts that do not belong together: different tokenizers, frames or chat templates, or only one
    of them has a header.
    """
    (first_prefix, first), *others = parts
    if first is None:
        known = next((prefix for prefix, header in others if header is not None), None)
        if known is None:
            return None
        raise DataError(_unlike(known, first_prefix, "a header beside it (.json)"))
    headers = [first]
    for prefix, header in others:
        if header is None:
            raise DataError(_unlike(first_prefix, prefix, "a header beside it (.json)"))
        for name in _ALIKE:
            if getattr(header, name) != getattr(first, name):
                raise DataError(_unlike(first_prefix, prefix, f"{name} {getattr(first, name)!r}"))
        if _chat_of(header) != _chat_of(first):
            raise DataError(_unlike(first_prefix, prefix, f"conversations of (template, train_on) {_chat_of(first)}"))
        headers.append(header)
    return first.model_copy(
        update={
            **{name: sum(getattr(header, name) for header in headers) for name in _SUMS},
            "max_token": max(header.max_token for header in headers),
            "crc32": crc32,
            "sources": [source for header in headers for source in header.sources],
            "bad_files": [line for header in headers for line in header.bad_files],
            "unknown_keys": _summed(header.unknown_keys for header in headers),
            "chat": _joined_chat([header.chat for header in headers if header.chat is not None]),
        }
    )


_SUMS = ("documents", "tokens", "input_bytes", "empty", "skipped")


def _unlike(has: str, has_not: str, what: str) -> str:
    return f"{has} has {what} but {has_not} does not: they do not belong in one file; preprocess them alike"


def _chat_of(header: DataHeader) -> tuple[str, str] | None:
    return None if header.chat is None else (header.chat.template, header.chat.train_on)


def _joined_chat(chats: Sequence[ChatInfo]) -> ChatInfo | None:
    if not chats:
        return None
    counts = [chat.counts for chat in chats if chat.counts is not None]
    joined = None
    if len(counts) == len(chats):
        joined = ConversationCounts(
            records=sum(count.records for count in counts),
            formats=_summed(count.formats for count in counts),
            dropped=_summed(count.dropped for count in counts),
            unknown_keys=_summed(count.unknown_keys for count in counts),
            longer_than=_summed(count.longer_than for count in counts),
        )
    learned = sum(chat.learned_tokens for chat in chats)
    return chats[0].model_copy(update={"learned_tokens": learned, "counts": joined})


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total.get(name, 0) + number
    return total
