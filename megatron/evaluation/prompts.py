"""Prompts as token ids: plain text with one begin-of-text token, or a conversation up to where the model answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.common.errors import UserError
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.chat import Chat, ChatError, Llama3Chat, Message, Segment, load_chat

Ids = tuple[int, ...]


@dataclass(frozen=True)
class PromptEncoder:
    """The tokenizer of a model and, where prompts are conversations, its chat format."""

    tokenizer: Tokenizer
    chat: Chat | None

    @classmethod
    def of(cls, args: NeoXArgs, *, chat: bool) -> PromptEncoder:
        """What the keys name. Raises UserError for a template or a tokenizer that cannot be used."""
        assert args.vocab_file is not None  # checked with the configuration
        tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file)
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
        """What every text begins with: the begin-of-text token, or nothing where the vocabulary has none."""
        return () if self.tokenizer.bos is None else (self.tokenizer.bos,)

    @property
    def end_of_answer(self) -> int:
        """The token after which nothing more is said: the end of a turn, or of the document."""
        if self.chat is None:
            return self.tokenizer.eod
        if isinstance(self.chat, Llama3Chat):
            return self.tokenizer.token_id("<|eot_id|>")
        return _after_answer(self.chat)

    def text(self, text: str) -> Ids:
        """Ids of a text that begins a document."""
        return (*self.beginning, *self.tokenizer.encode(text))

    def text_of(self, ids: Sequence[int]) -> str:
        """Text of ids without the special tokens among them."""
        special = set(self.tokenizer.special_tokens.values())
        return self.tokenizer.decode([index for index in ids if index not in special])

    def conversation(self, messages: Sequence[Message], prefill: str = "") -> Ids:
        """Ids up to where the assistant answers, and of the beginning of its answer that is given."""
        ids: list[int] = []
        for segment in _before_answer(self.chat, messages):
            ids += segment.ids if segment.text is None else self.tokenizer.encode(segment.text)
        return (*ids, *self.tokenizer.encode(prefill))

    def conversation_text(self, messages: Sequence[Message]) -> str:
        """`conversation` as text, with special tokens by their names, for libraries that want a string."""
        return "".join(
            self.tokenizer.decode(segment.ids) if segment.text is None else segment.text
            for segment in _before_answer(self.chat, messages)
        )

    def with_special_tokens(self, text: str) -> Ids:
        """Ids of a text in which names of special tokens are those tokens; for what `conversation_text` wrote."""
        names = self.tokenizer.special_tokens
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            ids += [names[part]] if part in names else self.tokenizer.encode(part)
        return tuple(ids)


_ANSWER = "answer"  # stands for the model's answer while a conversation is laid out


def _with_answer(chat: Chat | None, messages: Sequence[Message]) -> list[Segment]:
    assert chat is not None
    try:
        return chat.segments([*messages, Message("assistant", _ANSWER)], "last")
    except ChatError as error:
        raise UserError(f"the chat template cannot write the prompt: {error}") from None


def _before_answer(chat: Chat | None, messages: Sequence[Message]) -> list[Segment]:
    segments = _with_answer(chat, messages)
    return segments[: next(place for place, segment in enumerate(segments) if segment.learned)]


def _after_answer(chat: Chat) -> int:
    """The end token that the format teaches after an answer."""
    ends = [segment.ids for segment in _with_answer(chat, [Message("user", "question")]) if segment.learned]
    return ends[-1][-1]
