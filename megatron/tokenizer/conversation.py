"""A conversation: what every reader of records gives, and what every chat format writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron.common.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["all", "last"]

# A reasoning trace as Llama-Nemotron writes it: the system line that asks for one or none, and what is around it.
THINKING_LINES = {True: "detailed thinking on", False: "detailed thinking off"}
THINK_BEGIN = "<think>\n"  # with its newline, as the training data have it: one token may hold both
THINK_END = "</think>"
THINK_CLOSING = f"\n{THINK_END}\n\n"  # from the trace to the answer


class ChatError(UserError, ValueError):
    """A conversation or template that cannot be used for training; the message says why.

    `rule` is the reason in a few words, the same for all records that it concerns: what is counted.
    """

    def __init__(self, message: str, rule: str = "cannot be understood") -> None:
        super().__init__(message)
        self.rule = rule


class NothingToLearn(ChatError):
    """A conversation without a turn that is learned: no mistake, but no sample either."""

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
    stops to call a tool and will go on with its result. `fields` is the turn as the record has it, which is what a
    template sees; None where the record has another shape than OpenAI's.
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
        """The content in the pieces in which the record has it."""
        content = None if self.fields is None else self.fields.get("content")
        return [part["text"] for part in content] if isinstance(content, list) else [self.content]

    def as_fields(self) -> Mapping[str, Any]:
        """The turn in OpenAI's shape."""
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
    """Turns, and what a record says beside them: the tools that the assistant may call, documents that it may read,
    and arguments for the chat template."""

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def learned_turns(messages: Sequence[Message], train_on: TrainOn) -> set[int]:
    """Numbers of the turns whose words are learned: where the record has switches, those; else as `train_on` says.

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
