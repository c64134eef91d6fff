"""Conversations as prompts: the ids that a chat model has learned to answer after.

The format is asked for a conversation with an answer in it; what stands before that answer is the prompt. So a prompt
is how the training conversation begins, whatever the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

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
    Role,
)
from megatron.tokenizer.template_chat import load_chat

_ANSWER = "."


@dataclass(frozen=True)
class ChatPrompts:
    """Makes prompts of conversations. `thinking` None leaves system prompt and answer alone."""

    chat: Chat
    tokenizer: Tokenizer
    system_prompt: str | None = None
    thinking: bool | None = None

    @classmethod
    def load(
        cls, template: str | None, tokenizer: Tokenizer, system_prompt: str | None, thinking: bool | None
    ) -> ChatPrompts:
        """Raises UserError for a template or vocabulary that cannot be used."""
        try:
            return cls(load_chat(template, tokenizer), tokenizer, system_prompt, thinking)
        except ChatError as error:
            raise UserError(f"chat_template {template}: {error}") from error

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt for the next turn of the assistant. Raises UserError where the format refuses the turns."""
        if not messages or messages[-1].role not in ("user", "tool"):
            raise UserError("the last turn of a conversation to be answered is the user's or a tool's")
        ids, answer = self._asked(self._with_system(messages))
        return ids[:answer] + (self.tokenizer.encode(THINK_BEGIN) if self.thinking else [])

    @property
    def closing(self) -> tuple[int, ...]:
        """What closes a trace."""
        return tuple(self.tokenizer.encode(THINK_CLOSING))

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        own = messages[0].content if messages[0].role == "system" else None
        text = self.system_prompt if own is None else own
        if self.thinking is not None:
            text = "\n\n".join(filter(None, (THINKING_LINES[self.thinking], text)))
        rest = list(messages) if own is None else list(messages[1:])
        return rest if text is None else [Message("system", text), *rest]

    def _asked(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """(ids of the conversation with an answer, where what is learned of the answer begins)."""
        conversation = Conversation([*messages, Message("assistant", _ANSWER)])
        segments = self.chat.segments(conversation, "last")
        texts = [segment.text for segment in segments if segment.text is not None]
        ids, labels = ids_and_labels(segments, [self.tokenizer.encode(text) for text in texts])
        return ids, next(place for place, label in enumerate(labels) if label >= 0)


def read_messages(record: Any) -> list[Message]:
    """Turns from OpenAI's shape, a list of objects with role and content. Raises UserError."""
    if not isinstance(record, list) or not record:
        raise UserError("messages: expected a list of turns, each with role and content")
    messages = []
    for number, turn in enumerate(record):
        if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
            found = ", ".join(map(str, turn)) if isinstance(turn, Mapping) else type(turn).__name__
            raise UserError(f"turn {number + 1} of messages: expected role and content, given {found or 'nothing'}")
        if turn["role"] not in get_args(Role) or not isinstance(turn["content"], str):
            raise UserError(
                f"turn {number + 1} of messages: role {turn['role']!r} with content of type "
                f"{type(turn['content']).__name__}; expected one of {', '.join(get_args(Role))} with a text"
            )
        messages.append(Message(turn["role"], turn["content"]))
    return messages
