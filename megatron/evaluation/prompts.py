"""Prompts as token ids: plain text with one begin-of-text token, or a conversation up to the model's answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.common.errors import UserError
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.chat import Chat, Segment
from megatron.tokenizer.conversation import ChatError, Conversation, Message
from megatron.tokenizer.template_chat import load_chat

Ids = tuple[int, ...]


@dataclass(frozen=True)
class PromptEncoder:
    """A model's tokenizer and, if prompts are conversations, its chat format."""

    tokenizer: Tokenizer
    chat: Chat | None

    @classmethod
    def of(cls, args: NeoXArgs, *, chat: bool) -> PromptEncoder:
        """Load the tokenizer and template that the keys name. Raises UserError if they cannot be used."""
        assert args.vocab_file is not None  # checked with the configuration
        tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file)
        if not chat:
            return cls(tokenizer, None)
        try:
            return cls(tokenizer, load_chat(args.chat_template, tokenizer))
        except ChatError as error:
            raise UserError(f"chat_template {args.chat_template}: {error}") from None
        except OSError as error:
            raise UserError(f"chat_template {args.chat_template}: {error.strerror}") from None

    @property
    def beginning(self) -> Ids:
        """The begin-of-text token, with which every text begins; nothing if the vocabulary has none."""
        return () if self.tokenizer.bos is None else (self.tokenizer.bos,)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text: end of document and, in a conversation, end of turn."""
        return (self.tokenizer.eod, *(() if self.chat is None else self.chat.end_of_turn))

    def text(self, text: str) -> Ids:
        """Token ids of a text at the beginning of a document."""
        return (*self.beginning, *self.tokenizer.encode(text))

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        special = set(self.tokenizer.special_tokens.values())
        return self.tokenizer.decode([index for index in ids if index not in special])

    def conversation(self, messages: Sequence[Message], prefill: str = "") -> Ids:
        """Token ids of a conversation up to the assistant's answer, followed by `prefill`, the start of the answer."""
        ids: list[int] = []
        for segment in _before_answer(self.chat, messages):
            ids += segment.ids if segment.text is None else self.tokenizer.encode(segment.text)
        return (*ids, *self.tokenizer.encode(prefill))

    def conversation_text(self, messages: Sequence[Message]) -> str:
        """`conversation` as text, with special tokens as their names, for libraries that need a string."""
        return "".join(
            self.tokenizer.decode(segment.ids) if segment.text is None else segment.text
            for segment in _before_answer(self.chat, messages)
        )

    def with_special_tokens(self, text: str) -> Ids:
        """Token ids of a text in which names of special tokens stand for the tokens, as in `conversation_text`."""
        names = self.tokenizer.special_tokens
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            ids += [names[part]] if part in names else self.tokenizer.encode(part)
        return tuple(ids)


_ANSWER = "answer"  # placeholder for the model's answer while a conversation is formatted


def _before_answer(chat: Chat | None, messages: Sequence[Message]) -> list[Segment]:
    assert chat is not None
    try:
        segments = chat.segments(Conversation([*messages, Message("assistant", _ANSWER)]), "last")
    except ChatError as error:
        raise UserError(f"the chat template cannot write the prompt: {error}") from None
    return segments[: next(place for place, segment in enumerate(segments) if segment.learned)]
