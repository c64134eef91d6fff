"""Conversations in the shapes that data sets have them, as one list of messages.

Known shapes: `messages` with role and content (OpenAI; also GPT-NeoX's `conversation`), `conversations` with from and
value (ShareGPT, OpenHermes 2.5), and Llama-Nemotron's `input`, `output`, `system_prompt`, `reasoning`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.tokenizer.chat import ChatError, Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
}
THINKING = {True: "detailed thinking on", False: "detailed thinking off"}  # Llama-Nemotron's system prompts
_EMPTY_TRACE = re.compile(r"\A\s*<think>\s*</think>\s*")
_TRACE = re.compile(r"<think>.*\S.*", re.DOTALL)


def read_conversation(record: dict[str, Any], thinking_prompt: bool) -> list[Message]:
    """The messages of a record, checked. Raises ChatError with what is wrong.

    Empty `<think></think>` pairs are taken out of assistant turns. With `thinking_prompt`, a conversation without a
    system turn gets "detailed thinking on" or "detailed thinking off", as its answers have a trace or not.
    """
    messages = _messages(record)
    if not messages:
        raise ChatError("the conversation is empty")
    messages = [replace(m, content=_EMPTY_TRACE.sub("", m.content)) if m.role == "assistant" else m for m in messages]
    if any(message.role == "system" for message in messages[1:]):
        raise ChatError("a system turn that is not the first")
    first = messages[1:2] if messages[0].role == "system" else messages[:1]
    if first and first[0].role != "user":
        raise ChatError(f"the first turn is the {first[0].role}'s; a user turn is expected")
    for turn, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise ChatError(f"turn {turn + 1}: the assistant says nothing")
    traces = any(m.role == "assistant" and _TRACE.search(m.content) for m in messages)
    if messages[0].role == "system":
        if traces and messages[0].content.strip() == THINKING[False]:
            raise ChatError(f"the system prompt is {THINKING[False]!r}, but an answer has a <think> trace")
    elif thinking_prompt:
        messages.insert(0, Message("system", THINKING[traces]))
    return [
        replace(message, waits_for_tool=message.role == "assistant" and following.role == "tool")
        for message, following in zip(messages, [*messages[1:], Message("user", "")], strict=True)
    ]


def _messages(record: dict[str, Any]) -> list[Message]:
    for field in ("messages", "conversations", "conversation"):
        if field in record:
            turns = record[field]
            if not isinstance(turns, list):
                raise ChatError(f"field {field!r} is not a list but {type(turns).__name__}")
            return [_turn(number, turn) for number, turn in enumerate(turns, start=1)]
    if "input" in record and "output" in record:
        return _nemotron(record)
    raise ChatError(
        f"no conversation: expected messages, conversations, conversation, or input and output; the fields are "
        f"{', '.join(list(record)[:8]) or 'none'}"
    )


def _nemotron(record: dict[str, Any]) -> list[Message]:
    turns = record["input"]
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not isinstance(record["output"], str):
        raise ChatError("input is neither text nor a list of turns, or output is not text")
    messages = [_turn(number, turn) for number, turn in enumerate(turns, start=1)]
    system = record.get("system_prompt") or None
    if system is None and record.get("reasoning") in ("on", "off"):
        system = THINKING[record["reasoning"] == "on"]
    if system is not None and not (messages and messages[0].role == "system"):
        messages.insert(0, Message("system", system))
    return [*messages, Message("assistant", record["output"])]


def _turn(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ChatError(f"turn {number}: expected an object with role and content, got {type(turn).__name__}")
    name = turn.get("role", turn.get("from"))
    if name not in ROLES:
        raise ChatError(f"turn {number}: the role {name!r} does not exist; expected one of {', '.join(ROLES)}")
    role = ROLES[name]
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part["text"]) for part in content)
    calls = turn.get("tool_calls") or []
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ChatError(f"turn {number}: the content is not text but {type(content).__name__}")
    return Message(role, content + "".join(_tool_call(number, call) for call in calls))


def _tool_call(number: int, call: Any) -> str:
    """A call in Llama 3.1's JSON form."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        return json.dumps({"type": "function", "name": function["name"], "parameters": arguments})
    except (KeyError, TypeError, ValueError) as error:
        raise ChatError(f"turn {number}: a tool call without function name and JSON arguments ({error})") from None


def digest(messages: Sequence[Message]) -> bytes:
    """Equal for conversations whose user and assistant say the same, up to white space; system prompts do not count."""
    said = [(m.role, " ".join(m.content.split())) for m in messages if m.role != "system"]
    return hashlib.blake2b(json.dumps(said).encode("utf-8", "surrogatepass"), digest_size=16).digest()
