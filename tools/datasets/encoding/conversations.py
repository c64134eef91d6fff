"""Converting records to validated conversations, and reporting unknown parts of the records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.tokenizer.conversation import ChatError, Conversation, Message
from megatron.tokenizer.turns import read_turn
from tools.datasets.encoding.record_formats import THINKING, recognize

_EMPTY_TRACE = re.compile(r"\A\s*<think>\s*</think>\s*")
_TRACE = re.compile(r"<think>.*\S.*", re.DOTALL)


@dataclass(frozen=True)
class ReadConversation:
    """A conversation, the format of its record, and the unknown keys of the record and its turns."""

    conversation: Conversation
    format: str
    unknown: tuple[str, ...]


def read_conversation(record: Mapping[str, Any], thinking_prompt: bool = False) -> ReadConversation:
    """The validated conversation of a record. ChatError states what is wrong.

    With `thinking_prompt`, empty `<think></think>` pairs are removed from assistant turns, and a conversation without a
    system turn gets "detailed thinking on" if its answers have a trace, else "detailed thinking off".
    """
    found = recognize(record)
    messages: list[Message] = []
    unknown = dict.fromkeys(found.unknown)
    for number, turn in enumerate(found.turns, start=1):
        message, keys = read_turn(number, turn)
        messages.append(message)
        unknown |= dict.fromkeys(f"{key} (of a turn)" for key in keys)
    if thinking_prompt:
        messages = [_without_empty_trace(message) for message in messages]
    _check(messages)
    traces = any(m.role == "assistant" and (m.reasoning or _TRACE.search(m.content)) for m in messages)
    if messages[0].role == "system":
        if traces and messages[0].content.strip() == THINKING[False]:
            raise ChatError(
                f"the system prompt is {THINKING[False]!r}, but an answer has a <think> trace", "thinking is off"
            )
    elif thinking_prompt:
        messages.insert(0, Message("system", THINKING[bool(traces)]))
    following = [message.role for message in messages[1:]] + [None]
    messages = [
        replace(m, waits_for_tool=m.role == "assistant" and (bool(m.calls) or after == "tool"))
        for m, after in zip(messages, following, strict=True)
    ]
    conversation = Conversation(messages, found.tools, found.documents, found.template_arguments)
    return ReadConversation(conversation, found.format, tuple(unknown))


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ChatError("the conversation is empty", "empty conversation")
    if any(message.role == "system" for message in messages[1:]):
        raise ChatError("a system turn is not the first turn", "system turn in the middle")
    first = messages[1:2] if messages[0].role == "system" else messages[:1]
    if first and first[0].role != "user":
        raise ChatError(f"the first turn is the {first[0].role}'s; expected a user turn", "no user turn first")
    for turn, message in enumerate(messages, start=1):
        if message.role in ("user", "assistant") and not message.content.strip() and not message.calls:
            raise ChatError(f"turn {turn}: the {message.role} says nothing", f"the {message.role} says nothing")


def _without_empty_trace(message: Message) -> Message:
    content = _EMPTY_TRACE.sub("", message.content)
    if message.role != "assistant" or content == message.content:
        return message
    fields = None if message.fields is None else {**message.fields, "content": content}
    return replace(message, content=content, fields=fields)


def digest(messages: Sequence[Message]) -> bytes:
    """Equal for conversations with the same user and assistant turns, up to white space; system prompts are ignored."""
    said = [
        (m.role, *(" ".join(text.split()) for text in (m.content, m.reasoning or "")), [repr(call) for call in m.calls])
        for m in messages
        if m.role != "system"
    ]
    return hashlib.blake2b(json.dumps(said).encode("utf-8", "surrogatepass"), digest_size=16).digest()
