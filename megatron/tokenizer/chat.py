"""Conversations as tokens, and which of them are learned.

`Llama3Chat` is the format that Llama 3 was tuned with (Meta's `llama-models`): begin-of-text once, then for every turn
its role between header tokens, two newlines, the content and an end token. `TemplateChat` follows a Jinja template of
Hugging Face instead. Both give segments, from which ids and labels follow without comparing lengths of prefixes:
content is always text, whatever it quotes, and what is learned is the assistant's content and its one end token.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron.common.labels import IGNORE_INDEX
from megatron.tokenizer.base import Tokenizer, TokenizerError

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["all", "last"]


class ChatError(ValueError):
    """A conversation or template that cannot be used for training; the message says why."""


@dataclass(frozen=True)
class Message:
    """One turn. `waits_for_tool`: the assistant stops to call a tool and will go on with its result."""

    role: Role
    content: str
    waits_for_tool: bool = False


@dataclass(frozen=True)
class Segment:
    """Part of a formatted conversation: ids that are fixed, or text that is still to be encoded."""

    ids: tuple[int, ...] = ()
    text: str | None = None
    learned: bool = False


class Chat(ABC):
    """A way to write conversations. `name` says which, in the header of the data."""

    name: str

    @abstractmethod
    def segments(self, messages: Sequence[Message], train_on: TrainOn) -> list[Segment]:
        """The conversation in order. Raises ChatError if it cannot be written so that labels are certain."""


class Llama3Chat(Chat):
    name = "llama3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises TokenizerError if the vocabulary lacks a Llama-3 token."""
        token = tokenizer.token_id
        self._bos = token("<|begin_of_text|>")
        self._end = {False: token("<|eot_id|>"), True: token("<|eom_id|>")}
        before, after = token("<|start_header_id|>"), (token("<|end_header_id|>"), *tokenizer.encode("\n\n"))
        names = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
        self._headers = {role: (before, *tokenizer.encode(name), *after) for role, name in names.items()}

    def segments(self, messages: Sequence[Message], train_on: TrainOn) -> list[Segment]:
        segments = [Segment((self._bos,))]
        learned = learned_turns(messages, train_on)
        for turn, message in enumerate(messages):
            segments += [
                Segment(self._headers[message.role]),
                Segment(text=message.content, learned=turn in learned),
                Segment((self._end[message.waits_for_tool],), learned=turn in learned),
            ]
        return segments


class TemplateChat(Chat):
    """A Jinja chat template, as in `tokenizer_config.json`.

    The template is rendered with marks in place of the contents, which shows its own words and where contents go. It
    is refused where that would not be the whole truth: contents that are changed or left out (templates that shorten
    earlier turns), turns that come out differently when the conversation goes on, no end token after the assistant.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.name = "sha256:" + hashlib.sha256(source.encode()).hexdigest()
        self._tokenizer = tokenizer
        self._bos = tokenizer.bos
        self._special = re.compile("(" + "|".join(map(re.escape, tokenizer.special_tokens)) + ")")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template is not valid Jinja: {error}") from error

    def _render(self, contents: Sequence[str], messages: Sequence[Message], prompt: bool = False) -> str:
        import jinja2

        names = {index: name for name, index in self._tokenizer.special_tokens.items()}
        turns = [
            {"role": message.role, "content": content} for message, content in zip(messages, contents, strict=True)
        ]
        try:
            return self._template.render(
                messages=turns,
                add_generation_prompt=prompt,
                bos_token="" if self._bos is None else names[self._bos],
                eos_token=names[self._tokenizer.eod],
            )
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template refuses the conversation: {error}") from error

    def segments(self, messages: Sequence[Message], train_on: TrainOn) -> list[Segment]:
        marks = [f"\ue000{turn}\ue001" for turn in range(len(messages))]
        frame = self._render(marks, messages)
        contents = self._contents(frame, marks, messages)
        learned = learned_turns(messages, train_on)
        for turn in learned:
            self._check_prefix(frame, marks, messages, turn)
        segments: list[Segment] = []
        rest = frame
        for turn, (mark, content) in enumerate(zip(marks, contents, strict=True)):
            literal, _, rest = rest.partition(mark)
            segments += self._literal(literal, turn - 1 in learned)
            segments.append(Segment(text=content, learned=turn in learned))
        segments += self._literal(rest, len(messages) - 1 in learned)
        if self._bos is not None:
            count = sum(segment.ids == (self._bos,) for segment in segments)
            if count > 1 or (count == 1 and segments[0].ids != (self._bos,)):
                raise ChatError(f"the chat template writes {count} begin-of-text tokens; one, in front, is right")
            if count == 0:
                segments.insert(0, Segment((self._bos,)))
        return segments

    def _contents(self, frame: str, marks: Sequence[str], messages: Sequence[Message]) -> list[str]:
        """What the template makes of the contents: nothing, or trimmed at both ends."""
        places = [frame.find(mark) for mark in marks]
        if -1 in places or places != sorted(places) or any(frame.count(mark) != 1 for mark in marks):
            raise ChatError("the chat template does not write every turn once and in order: it rewrites earlier turns")
        real = self._render([message.content for message in messages], messages)
        for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
            expected = frame
            for mark, content in zip(marks, contents, strict=True):
                expected = expected.replace(mark, content)
            if real == expected:
                return contents
        raise ChatError("the chat template changes what was said (it rewrites turns); labels would be uncertain")

    def _check_prefix(self, frame: str, marks: Sequence[str], messages: Sequence[Message], turn: int) -> None:
        """What is generated at `turn` must be what stands there in the end."""
        prompt = self._render(marks[:turn], messages[:turn], prompt=True)
        if not frame.startswith(prompt + marks[turn]):
            raise ChatError(
                f"the chat template rewrites earlier turns: the prompt for turn {turn + 1} is not how the finished "
                f"conversation begins"
            )

    def _literal(self, text: str, after_learned: bool) -> list[Segment]:
        """The template's own words, special tokens recognised; the first one ends a learned turn."""
        parts = [part for part in self._special.split(text) if part]
        segments = []
        for place, part in enumerate(parts):
            index = self._tokenizer.special_tokens.get(part)
            if place == 0 and after_learned and index is None:
                break
            if index is None:
                segments.append(Segment(text=part))
            else:
                segments.append(Segment((index,), learned=place == 0 and after_learned))
        if after_learned and not segments:
            raise ChatError(f"the chat template puts no end token behind the assistant's words but {text[:40]!r}")
        return segments


def learned_turns(messages: Sequence[Message], train_on: TrainOn) -> set[int]:
    """Numbers of the turns whose words are learned. Raises ChatError if there are none."""
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise ChatError("nothing to learn: no assistant turn")
    return set(turns if train_on == "all" else turns[-1:])


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


def load_chat(template: str | None, tokenizer: Tokenizer) -> Chat:
    """The Llama-3 format, or the Jinja template in a file: plain, or `chat_template` of a tokenizer_config.json.

    Raises ChatError, TokenizerError or OSError.
    """
    import json
    from pathlib import Path

    if template is None:
        return Llama3Chat(tokenizer)
    text = Path(template).read_text()
    if template.endswith(".json"):
        content: Any = json.loads(text).get("chat_template")
        if not isinstance(content, str):
            raise TokenizerError(f"{template}: no chat_template in it; give a file that has one, or a .jinja file")
        text = content
    return TemplateChat(text, tokenizer)


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
