"""Conversations as tokens, and which of them are learned.

`Llama3Chat` is the format that Llama 3 was tuned with (Meta's `llama-models`): begin-of-text once, then for every turn
its role between header tokens, two newlines, the content and an end token. `TemplateChat` (in `template_chat`) follows
a Hugging Face Jinja template instead. Both give segments, from which ids and labels follow without comparing lengths of
prefixes: content is always text, whatever it quotes, and the learned part is the assistant's text and the token that
ends its turn.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.common.labels import IGNORE_INDEX
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.chat_template import TEMPLATE_FOLDER
from megatron.tokenizer.conversation import (
    THINK_BEGIN,
    THINK_CLOSING,
    ChatError,
    ChatToolCall,
    Conversation,
    Message,
    TrainOn,
    learned_turns,
)

QUERY_TOOLS = ("brave_search", "wolfram_alpha", "photogen")  # Llama's built-in tools, which are called with one query
CODE_TOOL = "code_interpreter"


@dataclass(frozen=True)
class Segment:
    """Part of a formatted conversation: ids that are fixed, or text that is still to be encoded."""

    ids: tuple[int, ...] = ()
    text: str | None = None
    learned: bool = False


class Chat(ABC):
    """A format of conversations.

    `name` identifies it in the header of the data; `template` is an equivalent Jinja template, None if there are
    several; `end_of_turn` are the ids that may end an assistant turn.
    """

    name: str
    template: str | None
    end_of_turn: list[int]

    @abstractmethod
    def segments(self, conversation: Conversation, train_on: TrainOn) -> list[Segment]:
        """The conversation in order. Raises ChatError if it cannot be written so that labels are certain."""


class Llama3Chat(Chat):
    name = "llama3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises TokenizerError if the vocabulary lacks a Llama-3 token."""
        token = tokenizer.token_id
        self._bos = token("<|begin_of_text|>")
        self._end = {False: token("<|eot_id|>"), True: token("<|eom_id|>")}
        self._python = token("<|python_tag|>")
        before, after = token("<|start_header_id|>"), (token("<|end_header_id|>"), *tokenizer.encode("\n\n"))
        names = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
        self._headers = {role: (before, *tokenizer.encode(name), *after) for role, name in names.items()}
        self.end_of_turn = list(self._end.values())
        self.template = (TEMPLATE_FOLDER / "llama3.jinja").read_text(encoding="utf-8")

    def segments(self, conversation: Conversation, train_on: TrainOn) -> list[Segment]:
        for what, given in (
            ("tools", conversation.tools),
            ("documents", conversation.documents),
            ("chat_template_kwargs", conversation.template_arguments),
        ):
            if given:
                raise ChatError(
                    f"the record has {what}, which Meta's format does not support; use a template that writes them: "
                    f"--chat-template llama3.1, or the model's own folder",
                    f"{what} without a template",
                )
        segments = [Segment((self._bos,))]
        learned = learned_turns(conversation.messages, train_on)
        for turn, message in enumerate(conversation.messages):
            said = [segment for segment in self._said(message, turn) if segment.ids or segment.text]
            segments.append(Segment(self._headers[message.role]))
            segments += [Segment(part.ids, part.text, turn in learned) for part in said]
            segments.append(Segment((self._end[message.waits_for_tool],), learned=turn in learned))
        return segments

    def _said(self, message: Message, turn: int) -> list[Segment]:
        """The segments between header and end token. Meta encodes each part of a content, and the call, separately."""
        if len(message.calls) > 1:
            raise ChatError(
                f"turn {turn + 1}: {len(message.calls)} tool calls in one turn; Llama 3 makes one at a time. Split the "
                f"turn, or follow a template that writes several (--chat-template)",
                "several calls in one turn",
            )
        texts = message.parts
        if message.reasoning is not None:
            texts = [f"{THINK_BEGIN}{message.reasoning}{THINK_CLOSING}{texts[0]}", *texts[1:]]
        parts = [Segment(text=text) for text in texts]
        for call in message.calls:
            if call.name == CODE_TOOL:
                parts.insert(0, Segment((self._python,)))
            parts.append(Segment(text=_call_text(call, turn)))
        return parts


def _call_text(call: ChatToolCall, turn: int) -> str:
    """A call as written by Llama 3: JSON, except for queries to its built-in tools and code."""
    argument = {CODE_TOOL: "code", **dict.fromkeys(QUERY_TOOLS, "query")}.get(call.name)
    if argument is None:
        body = {"type": "function", "name": call.name, "parameters": call.arguments}
        return json.dumps(body, ensure_ascii=False)
    value = call.arguments.get(argument)
    if list(call.arguments) != [argument] or not isinstance(value, str):
        raise ChatError(
            f"turn {turn + 1}: {call.name} is a tool of Llama 3's own, called with one text, {argument!r}; the "
            f"arguments are {', '.join(call.arguments) or 'none'}",
            "arguments of a built-in tool",
        )
    return value if call.name == CODE_TOOL else f'{call.name}.call(query="{value}")'


def ids_and_labels(segments: Sequence[Segment], encoded: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Ids and labels (the id where it is learned, -100 elsewhere) of segments whose texts, in order, are `encoded`."""
    ids: list[int] = []
    labels: list[int] = []
    texts = iter(encoded)
    for segment in segments:
        part = segment.ids if segment.text is None else next(texts)
        ids += part
        labels += part if segment.learned else [IGNORE_INDEX] * len(part)
    return ids, labels
