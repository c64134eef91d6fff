"""Typed prompts: which lines are prompts, what a conversation remembers, which process reads the input."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.generation import interactive
from megatron.generation.conversations import ChatPrompts
from megatron.generation.prompts import endings_of
from megatron.generation.requests import PromptReader
from megatron.generation.sampling import Sampling
from megatron.generation.sequences import Continuation
from megatron.parallel.rank_env import TYPED
from megatron.tokenizer import Tokenizer
from tests.support.models import Case

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


class Alone:
    """A world of one rank."""

    rank = 0

    @classmethod
    def world(cls, *_: Any) -> Alone:
        return cls()

    def broadcast(self, value: Any) -> Any:
        return value


def asked(typed: bytes, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, *, chat: bool) -> list[str]:
    """Text of each prompt given to the model, which answers "Ja.", for this typed input."""
    args = Case(vocab=1024, seq=128).neox(world_size=1, chat=chat)
    format_ = ChatPrompts.load(None, tokenizer, None, None) if chat else None
    found: list[str] = []

    def run(sequences: list[Continuation], *_: Any, on_tokens: Any) -> None:
        (sequence,) = sequences
        found.append(tokenizer.decode(sequence.prompt))
        sequence.new, sequence.end = tokenizer.encode("Ja."), "stop"
        on_tokens(sequence, sequence.new)

    reader, writer = os.pipe()
    os.write(writer, typed)
    os.close(writer)
    monkeypatch.setenv(TYPED, str(reader))
    monkeypatch.setattr(interactive, "RankGroup", Alone)
    generator: Any = SimpleNamespace(args=args, place=SimpleNamespace(device=None), run=run, own_share=list)
    whereabouts: Any = SimpleNamespace(at=lambda _: None)
    prompts = PromptReader(args, tokenizer, format_)
    endings = endings_of(args, tokenizer, format_)
    interactive.Dialogue(generator, prompts, Sampling(), endings, whereabouts).hold()
    return found  # `reader` stays open: a thread may still read from it


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        (b"a star\n\n  \nZ\xc3\xbcrich \nstop\nnever\n", ["a star", "Zürich "]),
        (b"one\nSTOP\n", ["one"]),
        (b"no newline", ["no newline"]),
        (b"not \xff UTF-8\n", ["not \ufffd UTF-8"]),
        (b"long " * 200 + b"\nshort\n", ["short"]),
        (b"", []),
    ],
)
def test_lines_are_prompts_until_stop_or_the_end(
    typed: bytes, prompts: list[str], hf_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(typed, hf_tokenizer, monkeypatch, chat=False)
    assert [text.removeprefix("<|begin_of_text|>") for text in found] == prompts


def test_a_conversation_goes_on_until_it_is_reset(hf_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = b"One?\nTwo?\n/what\n/reset\nstop\n/exit\nnever\n"
    first, second, third = asked(typed, hf_tokenizer, monkeypatch, chat=True)
    answered = first + "Ja.<|eot_id|>"
    assert second.startswith(answered)
    assert second[len(answered) :] == first.removeprefix("<|begin_of_text|>").replace("One?", "Two?")
    assert third == first.replace("One?", "stop"), "a word that ends single prompts is a turn like others"
