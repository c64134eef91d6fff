"""Writes the prompts of a question, by method and kind of prompt (plain text or conversation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.evaluation.multiple_choice.items import Item
from megatron.evaluation.prompts import Ids, PromptEncoder
from megatron.evaluation.scoring import Pair
from megatron.neox_arguments.keys.evaluation import McqKeys
from megatron.tokenizer.conversation import THINK_BEGIN, THINKING_LINES, Message

ASK_FOR_JSON = (
    "You are an expert who answers multiple-choice questions. Choose the one best option, always choose one, and reply "
    'with a JSON object of two keys: "ANSWER" with the letter alone, and "EXPLANATION" with your reason.'
)


@dataclass(frozen=True)
class Question:
    """An item with one order of its options: `order[i]` is the index of the item's option under letter i."""

    item: Item
    order: tuple[int, ...]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(self.item.options[index] for index in self.order)


def orders_of(item: Item, cyclic: bool) -> list[Question]:
    """The item as given, or in all cyclic orders, so that every option appears under every letter once."""
    n = len(item.options)
    shifts = range(n) if cyclic else range(1)
    return [Question(item, tuple((place + shift) % n for place in range(n))) for shift in shifts]


@dataclass(frozen=True)
class PromptWriter:
    """Writes prompts according to the keys, as conversations if the encoder has a chat format.

    `shots` are examples with their answers. `thinking` True or False puts the line that asks for a reasoning trace or
    for none at the start of the system prompt; with True the answer begins with <think>.
    """

    keys: McqKeys
    encoder: PromptEncoder
    shots: Sequence[Item] = ()
    system_prompt: str | None = None
    thinking: bool | None = None

    @property
    def plain(self) -> bool:
        return self.encoder.chat is None

    def letters(self, question: Question) -> list[Pair]:
        """The prompt paired with each letter."""
        prompt = self.prompt(question)
        space = " " if self.plain else ""  # "Answer: A", but {"ANSWER": "A
        encode = self.encoder.tokenizer.encode
        return [Pair(prompt, tuple(encode(space + letter))) for letter in question.item.letters]

    def texts(self, question: Question) -> list[Pair]:
        """The prompt paired with each option's text."""
        prompt = self.prompt(question)
        space = " " if self.plain else ""
        return [Pair(prompt, tuple(self.encoder.tokenizer.encode(space + option))) for option in question.options]

    def texts_alone(self, question: Question) -> list[Pair]:
        """An empty question paired with each option's text, to score how likely the texts are by themselves."""
        nothing = Question(Item(question.item.number, "", question.item.options, None), question.order)
        return self.texts(nothing)

    def prompt(self, question: Question) -> Ids:
        """Token ids of everything before the answer."""
        if self.plain:
            parts = [self.keys.instruction] if self.keys.instruction else []
            parts += [f"{self._asked(Question(shot, _given(shot)))} {self._told(shot)}" for shot in self.shots]
            return self.encoder.text("\n\n".join([*parts, self._asked(question)]))
        return self.encoder.conversation(self._messages(question), self._prefill)

    def _asked(self, question: Question) -> str:
        lines = [f"Question: {question.item.question}" if question.item.question else "Question:"]
        if self.keys.method != "text":
            lines += [f"{letter}. {text}" for letter, text in zip(question.item.letters, question.options, strict=True)]
        return "\n".join([*lines, "Answer:"])

    def _told(self, shot: Item) -> str:
        assert shot.answer is not None  # examples are chosen to have answers
        return shot.options[shot.answer] if self.keys.method == "text" else shot.letters[shot.answer]

    def _messages(self, question: Question) -> list[Message]:
        instruction = self.keys.instruction
        if instruction is None and self.keys.method != "text":
            instruction = ASK_FOR_JSON
        asked = self._asked(question).removesuffix("\nAnswer:")
        user = Message("user", f"{instruction}\n\n{asked}" if instruction else asked)
        thinking = "" if self.thinking is None else THINKING_LINES[self.thinking]
        system = "\n\n".join(filter(None, [thinking, self.system_prompt]))
        return [Message("system", system), user] if system else [user]

    @property
    def _prefill(self) -> str:
        if self.thinking:
            return THINK_BEGIN
        if self.keys.prefill is not None:
            return self.keys.prefill
        return '{"ANSWER": "' if self.keys.method == "letter" else ""


def _given(item: Item) -> tuple[int, ...]:
    return tuple(range(len(item.options)))


def joined_differently(encoder: PromptEncoder, pair: Pair) -> bool:
    """Whether prompt and continuation would be tokenized differently as one text.

    Such a continuation is scored with tokens that the model has not seen in this position.
    """
    prompt = pair.context[len(encoder.beginning) :]
    text = encoder.tokenizer.decode(prompt) + encoder.tokenizer.decode(pair.continuation)
    return encoder.with_special_tokens(text) != (*prompt, *pair.continuation)
