"""Conversations as written by a Jinja template, and which parts are learned.

A template is a program that writes one text, in which the assistant's parts have to be located. `{% generation %}`
blocks mark them, if there are any. Otherwise the learned part of a turn begins where the prompt for that turn ends, and
that prompt must be a prefix of the finished conversation. Anything that would make labels or content uncertain is
refused: a turn that changes as the conversation grows, omitted text, tools or reasoning, a missing end token.

Special tokens that a record quotes are text. To distinguish them from those that the template writes, quoted ones are
enclosed in guards, two characters that occur nowhere else, and the text without the guards must be the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.tokenizer.base import END_OF_TURN_NAMES, Tokenizer
from megatron.tokenizer.chat import Chat, Llama3Chat, Segment
from megatron.tokenizer.chat_template import GENERATED, ChatTemplate, load_chat_template
from megatron.tokenizer.conversation import ChatError, Conversation, Message, TrainOn, learned_turns

_GUARDS = ("\ue0f0", "\ue0f1")
_GENERATION_MARKS = re.compile(f"[{''.join(GENERATED)}]")
_THOUGHT = re.compile(r".*</think>", re.DOTALL)
Span = tuple[int, int]


class TemplateChat(Chat):
    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """`arguments` are variables of the template; a record's own take precedence."""
        self._template, self._arguments, self._bos = template, dict(arguments or {}), tokenizer.bos
        self._ids = tokenizer.special_tokens
        names = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)")
        self.name = template.identity
        self.template = None if template.named else template.sources["default"]
        self.end_of_turn = []
        eos = template.special_tokens.get("eos_token")
        for name in (eos, *END_OF_TURN_NAMES):
            signs = [str(name), "eos_token"] if name == eos else [str(name)]
            written = any(sign in source for source in template.sources.values() for sign in signs)
            if name in self._ids and written and self._ids[name] not in self.end_of_turn:
                self.end_of_turn.append(self._ids[name])

    def segments(self, conversation: Conversation, train_on: TrainOn) -> list[Segment]:
        plain = replace(conversation, messages=[message.plain() for message in conversation.messages])
        try:
            return self._segments(conversation, train_on)
        except ChatError:
            # Some templates write arguments given as JSON text as a quoted string, and content given in parts as a
            # Python list: such a template gets them as an object and as one text.
            if all(a is b for a, b in zip(plain.messages, conversation.messages, strict=True)):
                raise
            return self._segments(plain, train_on)

    def _segments(self, conversation: Conversation, train_on: TrainOn) -> list[Segment]:
        learned = learned_turns(conversation.messages, train_on)
        text, guarded = self._guarded(conversation)
        self._check_nothing_is_left_out(text, conversation, guarded)
        if self._template.has_generation_blocks(conversation.tools):
            spans = self._generated(text, guarded, learned)
        else:
            spans = {turn: self._answer(text, guarded, turn) for turn in sorted(learned)}
        for turn, (start, end) in spans.items():
            missing = _missing(conversation.messages[turn], _unguarded(text[start:end]))
            if missing:
                raise ChatError(
                    f"the chat template changes what was said (turn {turn + 1}: {missing}), or rewrites earlier turns; "
                    f"labels would be uncertain",
                    "template changes what was said",
                )
        segments = list(self._pieces(text, sorted(spans.values())))
        if self._bos is not None:
            count = sum(segment.ids == (self._bos,) for segment in segments)
            if count > 1 or (count == 1 and segments[0].ids != (self._bos,)):
                raise ChatError(
                    f"the chat template writes {count} begin-of-text tokens; expected one, at the start",
                    "begin-of-text",
                )
            if count == 0:
                segments.insert(0, Segment((self._bos,)))
        return segments

    # --- rendering

    def _render(self, conversation: Conversation, turns: int | None = None, **options: Any) -> str:
        """The first `turns` turns (default: all)."""
        arguments = {**self._arguments, **conversation.template_arguments}
        messages = [message.as_fields() for message in conversation.messages[:turns]]
        return self._template.render(
            messages, conversation.tools, conversation.documents, arguments=arguments, **options
        )

    def _guarded(self, conversation: Conversation) -> tuple[str, Conversation]:
        """The text with guards around the special tokens that the record quotes, and the record that gives it."""
        text = self._render(conversation)
        said = [message.as_fields() for message in conversation.messages]
        whole = json.dumps([said, conversation.tools, conversation.documents], ensure_ascii=False, default=str)
        if any(mark in whole for mark in (*_GUARDS, *GENERATED)):
            raise ChatError("the record has letters of private use, of U+E0F0 to U+E0FF", "private use")
        if not self._special.search(whole):
            return text, conversation
        guard = self._guard
        guarded = Conversation(
            [replace(m, fields=guard(dict(m.as_fields()))) for m in conversation.messages],
            guard(conversation.tools),
            guard(conversation.documents),
            conversation.template_arguments,
        )
        with_guards = self._render(guarded)
        if _unguarded(with_guards) != text:
            raise ChatError(
                "the chat template changes what was said where special tokens are quoted",
                "template changes what was said",
            )
        return with_guards, guarded

    def _guard(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda match: f"{_GUARDS[0]}{match[0]}{_GUARDS[1]}", value)
        if isinstance(value, dict):
            return {self._guard(key): self._guard(item) for key, item in value.items()}
        return [self._guard(item) for item in value] if isinstance(value, list) else value

    # --- locating the assistant's text

    def _generated(self, text: str, conversation: Conversation, learned: set[int]) -> dict[int, Span]:
        """The output of the generation blocks, and the special token after it if the block does not contain it."""
        marked = self._render(conversation, mark=True)
        if _GENERATION_MARKS.sub("", marked) != text:
            raise ChatError("the chat template treats what its generation blocks write as text", "generation blocks")
        spans: list[Span] = []
        place = begin = 0
        for part in re.split(f"({_GENERATION_MARKS.pattern})", marked):
            if part == GENERATED[0]:
                begin = place
            elif part == GENERATED[1]:
                spans.append((begin, place))
            else:
                place += len(part)
        turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        if len(spans) != len(turns):
            raise ChatError(
                f"the chat template has {len(spans)} generation blocks for {len(turns)} assistant turns; labels would "
                f"be uncertain",
                "generation blocks",
            )
        return {
            turn: (start, self._end(text, start, end))
            for turn, (start, end) in zip(turns, spans, strict=True)
            if turn in learned
        }

    def _end(self, text: str, start: int, end: int) -> int:
        """End of a block, with the token that ends the turn."""
        inside = self._special_places(text[start:end])
        if inside and not text[start + inside[-1][1] : end].strip():
            return end
        behind = self._special.match(text, end)
        if behind is None:
            raise _no_end(text[end : end + 40])
        return behind.end()

    def _answer(self, text: str, conversation: Conversation, turn: int) -> Span:
        """The span from the end of the prompt for a turn to the token that ends it."""
        prompt = self._render(conversation, turn, prompt=True)
        if not text.startswith(prompt):
            raise ChatError(
                f"the chat template rewrites earlier turns: the prompt for turn {turn + 1} is not how the finished "
                f"conversation begins",
                "template rewrites earlier turns",
            )
        # This turn is what remains the same when later turns are added.
        last = turn == len(conversation.messages) - 1
        so_far = text if last else _common(text, self._render(conversation, turn + 1))
        answer = so_far[len(prompt) :]
        places = self._special_places(answer)
        message = conversation.messages[turn]
        # Does it begin where the prompt ends? A template may ignore add_generation_prompt.
        if message.calls or message.reasoning is not None:
            same = prompt == self._render(conversation, turn)
            begins = not (same and places and not answer[: places[0][0]].strip())
        else:
            begins = not message.content or any(
                _squeezed(_unguarded(answer)).startswith(form) for form in _forms(message.content)
            )
        if not begins and not _missing(message, answer):
            raise ChatError(
                f"the prompt for turn {turn + 1} does not end where the answer begins: the chat template does not "
                f"follow add_generation_prompt, or writes words of its own before the answer",
                "no generation prompt",
            )
        # The end tokens before which the whole turn has been written.
        whole = [end for start, end in places if not _missing(message, answer[:start])]
        if not whole:
            missing = _missing(message, answer)
            if missing:
                raise ChatError(
                    f"the chat template changes what was said, or rewrites earlier turns (turn {turn + 1}: {missing}); "
                    f"labels would be uncertain",
                    "template changes what was said",
                )
            raise _no_end(answer[-40:])
        return len(prompt), len(prompt) + (whole[-1] if message.calls else whole[0])

    def _special_places(self, text: str) -> list[Span]:
        """Special tokens that the template writes: those without a guard."""
        return [m.span() for m in self._special.finditer(text) if text[m.start() - 1 : m.start()] != _GUARDS[0]]

    def _pieces(self, text: str, spans: Sequence[Span]) -> Iterator[Segment]:
        """The text in segments, cut where special tokens are and where learning begins or ends."""
        place = 0
        cuts = [(start, end, True) for start, end in spans]
        for start, end, learned in [*cuts, (len(text), len(text), False)]:
            yield from self._cut(text[place:start], False)
            yield from self._cut(text[start:end], learned)
            place = end

    def _cut(self, text: str, learned: bool) -> Iterator[Segment]:
        place = 0
        for start, end in [*self._special_places(text), (len(text), len(text))]:
            if start > place:
                yield Segment(text=_unguarded(text[place:start]), learned=learned)
            if end > start:
                yield Segment((self._ids[text[start:end]],), learned=learned)
            place = end

    # --- what the template leaves out

    def _check_nothing_is_left_out(self, text: str, conversation: Conversation, guarded: Conversation) -> None:
        """Every turn has to be written in order (system prompts anywhere), the tools and the documents as well."""
        everything = rest = _squeezed(_unguarded(text))
        for turn, message in enumerate(conversation.messages):
            found = _behind(rest if message.role != "system" else everything, message.parts)
            if found is None and message.role == "assistant":
                # Templates may remove the reasoning from earlier answers.
                found = _behind(rest, [_THOUGHT.sub("", part) for part in message.parts])
            if _is_quoted(message, everything):
                found = None
            if found is None:
                raise ChatError(
                    f"the chat template leaves out or changes what was said in turn {turn + 1} ({message.role}): it "
                    f"rewrites earlier turns, or knows no such turn",
                    "template changes what was said",
                )
            if message.role != "system":
                rest = found
        chosen = self._template.choose(conversation.tools)
        for what in ("tools", "documents"):
            if getattr(guarded, what):
                without = replace(guarded, tools=None) if what == "tools" else replace(guarded, documents=None)
                try:
                    same = self._render(without, name=chosen) == text
                except ChatError:
                    same = False
                if same:
                    raise ChatError(
                        f"the record has {what}, and the chat template does not write them; use one that does",
                        f"template leaves out {what}",
                    )


def _common(first: str, second: str) -> str:
    """The common prefix of both."""
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[: next(differ, min(len(first), len(second)))]


def _missing(message: Message, said: str) -> str:
    """The parts of a turn that are missing from a text, ignoring white space; empty if none is."""
    said = _squeezed(_unguarded(said))
    for part in message.parts:
        if _squeezed(_unguarded(part)) not in said:
            return "the content"
    if message.reasoning is not None and _squeezed(_unguarded(message.reasoning)) not in said:
        return "the reasoning"
    for call in message.calls:
        if _squeezed(_unguarded(call.name)) not in said:
            return f"the call of {call.name}"
        for value in _texts(call.arguments):
            if not any(form in said for form in _forms(value)):
                return f"an argument of {call.name}"
    return ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _behind(text: str, words: Sequence[str]) -> str | None:
    """The text after the given words, which must occur in this order; None if they do not."""
    place = 0
    for word in words:
        for form in _forms(word):
            found = text.find(form, place)
            if found >= 0:
                place = found + len(form)
                break
        else:
            return None
    return text[place:]


def _forms(text: str) -> tuple[str, str, str]:
    """A text as it is and as JSON writes it, without white space."""
    return _squeezed(text), _squeezed(json.dumps(text, ensure_ascii=False)[1:-1]), _squeezed(json.dumps(text)[1:-1])


def _is_quoted(message: Message, text: str) -> bool:
    """Whether `text` has JSON arguments of the turn as a quoted string, or its content's parts as a Python list."""
    fields = message.as_fields()
    if isinstance(fields.get("content"), list) and _squeezed(str(fields["content"])) in text:
        return True
    for call in fields.get("tool_calls") or ():
        arguments = call["function"].get("arguments") if isinstance(call.get("function"), dict) else None
        if isinstance(arguments, str) and '"' in arguments and any(form in text for form in _forms(arguments)[1:]):
            return True
    return False


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _unguarded(text: str) -> str:
    return text.replace(_GUARDS[0], "").replace(_GUARDS[1], "")


def _no_end(behind: str) -> ChatError:
    return ChatError(f"the chat template puts no end token after the assistant's text but {behind!r}", "no end token")


def load_chat(given: str | None, tokenizer: Tokenizer, arguments: Mapping[str, Any] | None = None) -> Chat:
    """Meta's format for Llama 3, the Jinja template in a file or folder, or a built-in one by name.

    Raises ChatError or TokenizerError.
    """
    if given is None:
        if arguments:
            raise ChatError("--template-arguments are for a --chat-template; none is given", "template")
        return Llama3Chat(tokenizer)
    return TemplateChat(load_chat_template(given, tokenizer), tokenizer, arguments)
