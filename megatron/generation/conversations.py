"""Turns conversations into prompts: the token ids after which a chat model has learned to answer.

A conversation is formatted with a placeholder answer, and everything before that answer is the prompt. A prompt is thus
a prefix of the formatted training conversation, whatever the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.common.errors import UserError
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import Chat, ids_and_labels
from megatron.tokenizer.conversation import (
    THINK_BEGIN,
    THINK_CLOSING,
    THINKING_LINES,
    ChatError,
    Conversation,
    Message,
)
from megatron.tokenizer.template_chat import load_chat
from megatron.tokenizer.turns import read_turn

_ANSWER = "."


@dataclass(frozen=True)
class ChatPrompts:
    """Turns conversations into prompts. With `thinking` None, system prompt and answer are left unchanged."""

    chat: Chat
    tokenizer: Tokenizer
    system_prompt: str | None = None
    thinking: bool | None = None

    @classmethod
    def load(
        cls, template: str | None, tokenizer: Tokenizer, system_prompt: str | None, thinking: bool | None
    ) -> ChatPrompts:
        """Load the chat format named `template`. Raises UserError if template or vocabulary cannot be used."""
        try:
            return cls(load_chat(template, tokenizer), tokenizer, system_prompt, thinking)
        except ChatError as error:
            raise UserError(f"chat_template {template}: {error}") from error

    def ids(self, conversation: Conversation) -> list[int]:
        """Token ids of the prompt for the assistant's next turn. Raises UserError if the format refuses the turns."""
        messages = conversation.messages
        if not messages or messages[-1].role not in ("user", "tool"):
            raise UserError("the last turn of a conversation to be answered must be the user's or a tool's")
        ids, answer = self._asked(replace(conversation, messages=self._with_system(messages)))
        return ids[:answer] + (self.tokenizer.encode(THINK_BEGIN) if self.thinking else [])

    @property
    def closing(self) -> tuple[int, ...]:
        """The tokens that close a reasoning trace."""
        return tuple(self.tokenizer.encode(THINK_CLOSING))

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        own = messages[0].content if messages[0].role == "system" else None
        text = self.system_prompt if own is None else own
        if self.thinking is not None:
            text = "\n\n".join(filter(None, (THINKING_LINES[self.thinking], text)))
        rest = list(messages) if own is None else list(messages[1:])
        return rest if text is None else [Message("system", text), *rest]

    def _asked(self, conversation: Conversation) -> tuple[list[int], int]:
        """(ids of the conversation with the placeholder answer, index of the answer's first learned token)."""
        before = [replace(message, learned=None) for message in conversation.messages]  # a record's choice
        answered = replace(conversation, messages=[*before, Message("assistant", _ANSWER)])
        segments = self.chat.segments(answered, "last")
        texts = [segment.text for segment in segments if segment.text is not None]
        ids, labels = ids_and_labels(segments, [self.tokenizer.encode(text) for text in texts])
        return ids, next(place for place, label in enumerate(labels) if label >= 0)


def read_request(messages: Any, fields: dict[str, Any]) -> Conversation:
    """Read a conversation to be answered, with turns in OpenAI's or ShareGPT's form, tool calls and reasoning included.

    Removes `tools`, `documents` and `chat_template_kwargs`, in the form of training data, from the record's other
    `fields`. Raises UserError for unknown keys of a turn: ignoring one could change the meaning.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: expected a list of turns, each with role and content")
    turns = []
    for number, turn in enumerate(messages, start=1):
        message, unknown = read_turn(number, turn)
        if unknown:
            raise UserError(f"turn {number}: {', '.join(unknown)} not known; expected role and content, or tool_calls")
        turns.append(message)
    following = [message.role for message in turns[1:]] + [None]
    turns = [
        replace(one, waits_for_tool=one.role == "assistant" and (bool(one.calls) or after == "tool"))
        for one, after in zip(turns, following, strict=True)
    ]
    given = {name: fields.pop(name, None) for name in ("tools", "documents")}
    for name, value in given.items():
        if value is not None and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise UserError(f"{name}: expected a list of objects")
    arguments = fields.pop("chat_template_kwargs", None)
    if arguments is not None and not isinstance(arguments, dict):
        raise UserError("chat_template_kwargs: expected an object")
    return Conversation(turns, given["tools"] or None, given["documents"] or None, arguments or {})
