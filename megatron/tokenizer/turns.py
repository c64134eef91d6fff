"""One turn of a conversation, in OpenAI's format (role, content, tool_calls) or ShareGPT's (from, value).

A key that affects the content or the loss is either understood or refused. Other unknown keys are named, for counting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron.tokenizer.conversation import ChatError, ChatToolCall, Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
_AS_TEMPLATES_KNOW = {"system", "user", "assistant", "tool", "developer", "ipython"}
_CALLS = ("function_call", "tool_call")  # roles whose value is a call
_ROLE, _CONTENT = ("role", "from", "speaker"), ("content", "value", "text")
REASONING = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("weight", "train", "trainable", "training", "learn", "loss")
_REFUSED = {
    "mask": "it may mean masked or learned",
    "masked": "it may mean masked or learned",
    "loss_mask": "it may mean masked or learned",
    "loss_weight": "turns are learned or not, without weights between",
    "train_detail": "turns are learned as a whole or not at all",
    "training_detail": "turns are learned as a whole or not at all",
    "refusal": "put the refusal into content, if it is to be learned",
    "audio": "this project trains on text",
    "image": "this project trains on text",
    "images": "this project trains on text",
    "video": "this project trains on text",
    "videos": "this project trains on text",
    "channel": "Llama has no channels",
    "recipient": "name the tool in tool_calls",
    "prefix": "continuing an answer that is given in part is not known here",
}
# Keys of other names that look as if they changed what is learned: pattern, kinds of values, what they look like
_LOOKS: tuple[tuple[re.Pattern[str], tuple[type, ...], str], ...] = (
    (re.compile("train|loss|learn|mask|weight|supervis|ignore"), (bool, int, float, list), "a switch; call it train"),
    (
        re.compile("reason|think|thought|rationale|(^|_)cot$|chain_of"),
        (str, list),
        "reasoning; call it reasoning_content",
    ),
    (re.compile("(^|_)(tools?|functions?)($|_)"), (list, dict), "tools or calls; call them tools or tool_calls"),
    (re.compile("^sys"), (str,), "a system prompt; call it system"),
)
_USED = {*_ROLE, *_CONTENT, *REASONING, *SWITCHES, "tool_calls", "function_call", "tool_call_id", "id"}


def read_turn(number: int, turn: Any) -> tuple[Message, list[str]]:
    """(the message, keys that are not known) of a turn, counted from 1. Raises ChatError."""
    if not isinstance(turn, Mapping):
        raise _error(number, f"expected an object with role and content, got {type(turn).__name__}", "not an object")
    turn = {key: value for key, value in turn.items() if value is not None}
    for key, reason in _REFUSED.items():
        if turn.get(key) not in (None, "", [], {}, "all"):
            raise _error(
                number, f"{key!r} changes what is said or learned, and is not understood: {reason}", f"key {key}"
            )
    # Role, calls and content, whatever their keys.
    given = _one_of(number, turn, _ROLE)
    name = given.strip().lower() if isinstance(given, str) else None
    if name not in ROLES:
        raise _error(number, f"the role {given!r} does not exist; expected one of {', '.join(ROLES)}", "unknown role")
    role = ROLES[name]
    value = _one_of(number, turn, _CONTENT)
    calls = _calls(number, turn)
    if name in _CALLS:
        calls, value = [*calls, *_calls_in_text(number, value)], ""
    if calls and role != "assistant":
        raise _error(number, f"tool calls in a turn of the {role}", "tool calls of another role")
    reasoning = _reasoning(number, turn)
    if reasoning is not None and role != "assistant":
        raise _error(number, f"reasoning in a turn of the {role}", "reasoning of another role")
    content = _content(number, value, optional=bool(calls) or reasoning is not None)
    if reasoning is not None and "<think>" in content:
        raise _error(number, "reasoning in a field of its own and in <think>; keep one of them", "reasoning twice")
    message = Message(
        role,
        content,
        calls=tuple(_call(number, call) for call in calls),
        reasoning=reasoning,
        learned=_switch(number, turn, role),
        fields=_fields(turn, name, role, value, calls),
    )
    # Keys that are left: harmless ones are reported, suspicious ones refused.
    known = _USED | set(_REFUSED) | ({"name"} if role == "tool" else set())
    unknown = [key for key in turn if key not in known]
    for key in unknown:
        looks = looks_like(key, turn[key])
        if looks is not None:
            raise _error(number, f"{key!r} is not known, and looks like {looks}; or take it out", f"key {key}")
    return message, unknown


def looks_like(key: str, value: Any) -> str | None:
    """What an unknown key seems to mean, None if nothing relevant."""
    for pattern, kinds, looks in _LOOKS:
        if pattern.search(key.lower()) and isinstance(value, kinds) and value not in ("", []):
            return looks
    return None


def _fields(turn: Mapping[str, Any], name: str, role: Role, value: Any, calls: list[Any]) -> Mapping[str, Any] | None:
    """The turn as passed to a template: unchanged if it is in OpenAI's format, else converted to it."""
    known = turn.get("role") in _AS_TEMPLATES_KNOW
    if known and not any(key in turn for key in ("value", "text", "function_call")):
        return turn
    fields = {key: item for key, item in turn.items() if key not in (*_ROLE, *_CONTENT, "function_call")}
    fields = {"role": name if name in _AS_TEMPLATES_KNOW else role, **fields}
    if value is not None:
        fields["content"] = value
    if calls:
        fields["tool_calls"] = [
            call if "function" in call else {"type": "function", "function": call} for call in calls
        ]
    return fields


def _one_of(number: int, turn: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of whichever key is present. Raises ChatError if two disagree."""
    values = [turn[name] for name in names if name in turn]
    if any(value != values[0] for value in values):
        given = " and ".join(name for name in names if name in turn)
        raise _error(number, f"{given} say different things; keep one", "two keys for one thing")
    return values[0] if values else None


def _content(number: int, value: Any, optional: bool) -> str:
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise _error(number, f"a part of the content is not text but {kind}", "content is not text")
        return "".join(part["text"] for part in value)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise _error(number, f"the content is not text but {type(value).__name__}", "content is not text")
    return value


def _reasoning(number: int, turn: Mapping[str, Any]) -> str | None:
    values = [turn[key] for key in REASONING if key in turn and turn[key] != ""]
    if not values:
        return None
    if not isinstance(values[0], str):
        raise _error(number, f"the reasoning is not text but {type(values[0]).__name__}", "reasoning is not text")
    if any(value != values[0] for value in values):
        raise _error(
            number, f"{' and '.join(k for k in REASONING if k in turn)} differ; keep one", "two keys for one thing"
        )
    return values[0] if values[0].strip() else None


def _switch(number: int, turn: Mapping[str, Any], role: Role) -> bool | None:
    """Whether the record says that this turn is learned, or is not."""
    values = {}
    for key in SWITCHES:
        if key in turn:
            if turn[key] not in (0, 1):
                raise _error(
                    number, f"{key!r} is {turn[key]!r}; a turn is learned (1, true) or is not (0, false)", f"key {key}"
                )
            values[key] = bool(turn[key])
    if not values:
        return None
    if len(set(values.values())) > 1:
        raise _error(number, f"{' and '.join(values)} say different things; keep one", "two keys for one thing")
    learned = next(iter(values.values()))
    if role == "assistant":
        return learned
    if learned:
        raise _error(
            number, f"{next(iter(values))!r} marks a {role} turn as learned; only assistant turns can be", "switch"
        )
    return None


def _calls(number: int, turn: Mapping[str, Any]) -> list[Any]:
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _error(number, f"tool_calls is not a list but {type(calls).__name__}", "tool calls")
    old = turn.get("function_call")
    if old and calls:
        raise _error(number, "function_call and tool_calls; keep one", "two keys for one thing")
    return [old] if old else calls


def _calls_in_text(number: int, value: Any) -> list[Any]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise _error(number, f"a tool call that is not JSON ({error})", "tool calls") from None
    return calls if isinstance(calls, list) else [calls]


def _call(number: int, call: Any) -> ChatToolCall:
    """A call in OpenAI's form, with its arguments as an object or as JSON in a text."""
    try:
        function = call.get("function", call)
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(function["name"], str) or not isinstance(arguments, dict):
            raise ValueError(f"name {function['name']!r}, arguments {type(arguments).__name__}")
        return ChatToolCall(function["name"], arguments)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _error(number, f"a tool call without function name and JSON arguments ({error})", "tool calls") from None


def _error(number: int, message: str, rule: str) -> ChatError:
    return ChatError(f"turn {number}: {message}", rule)
