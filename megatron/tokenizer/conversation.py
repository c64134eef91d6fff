"""A conversation: the output of every reader of records, and the input of every chat format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron.common.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["all", "last"]

# A reasoning trace as in Llama-Nemotron: the system line that turns it on or off, and its delimiters.
THINKING_LINES = {True: "detailed thinking on", False: "detailed thinking off"}
THINK_BEGIN = "<think>\n"  # with its newline, as in the training data: one token may contain both
THINK_END = "</think>"
THINK_CLOSING = f"\n{THINK_END}\n\n"  # from the trace to the answer


class ChatError(UserError, ValueError):
    """A conversation or template that cannot be used for training; the message says why.

    `rule` is the reason in a few words, the same for all records that it applies to, used for counting.
    """

    def __init__(self, message: str, rule: str = "cannot be understood") -> None:
        super().__init__(message)
        self.rule = rule


class NothingToLearn(ChatError):
    """A conversation without a learned turn: valid, but it gives no sample."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "nothing to learn")


@dataclass(frozen=True)
class ChatToolCall:
    """The assistant calls a function."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn.

    `learned` is the record's own switch for this turn; None leaves it to `train_on`. `waits_for_tool`: the assistant
    stops to call a tool and will continue with its result. `fields` is the turn as in the record, which is passed to a
    template; None if the record is not in OpenAI's format.
    """

    role: Role
    content: str
    waits_for_tool: bool = False
    calls: tuple[ChatToolCall, ...] = ()
    reasoning: str | None = None
    learned: bool | None = None
    fields: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def parts(self) -> list[str]:
        """The content in the parts of the record."""
        content = None if self.fields is None else self.fields.get("content")
        return [part["text"] for part in content] if isinstance(content, list) else [self.content]

    def as_fields(self) -> Mapping[str, Any]:
        """The turn in OpenAI's format."""
        if self.fields is not None:
            return self.fields
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            fields["reasoning_content"] = self.reasoning
        if self.calls:
            fields["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return fields

    def plain(self) -> Message:
        """The same turn with its content as one text, and the arguments of calls as objects."""
        if self.fields is None:
            return self
        fields = dict(self.fields)
        if isinstance(fields.get("content"), list):
            fields["content"] = self.content
        if any(isinstance(_function(call).get("arguments"), str) for call in fields.get("tool_calls") or ()):
            fields["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
                if isinstance(_function(call).get("arguments"), str)
                else call
                for call in fields["tool_calls"]
            ]
        return self if fields == self.fields else replace(self, fields=fields)


def _function(call: Any) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


@dataclass(frozen=True)
class Conversation:
    """Turns, and the other fields of a record: tools that the assistant may call, documents that it may read, and
    arguments for the chat template."""

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def learned_turns(messages: Sequence[Message], train_on: TrainOn) -> set[int]:
    """Indices of the learned turns: by the record's switches if it has any, else by `train_on`.

    Raises NothingToLearn if there are none.
    """
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise NothingToLearn("nothing to learn: no assistant turn")
    default = set(turns if train_on == "all" else turns[-1:])
    learned = {i for i in turns if (i in default if messages[i].learned is None else messages[i].learned)}
    if not learned:
        raise NothingToLearn("nothing to learn: the record switches off every assistant turn that would be learned")
    return learned
