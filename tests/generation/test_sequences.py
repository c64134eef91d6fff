"""Ends of texts: ids, strings that span tokens, traces with a budget; and streaming of text."""

from __future__ import annotations

import pytest

from megatron.generation.prompts import endings_of
from megatron.generation.sequences import Continuation, Endings, TextStream
from megatron.tokenizer import Tokenizer
from tests.support.models import Case

pytestmark = pytest.mark.unit

CONTEXT = 1000


def _sequence(limit: int = 200, trace: bool = False) -> Continuation:
    return Continuation(0, 0, [1, 2, 3], limit, trace=trace)


def _feed(sequence: Continuation, ids: list[int], endings: Endings, context: int = CONTEXT) -> list[int]:
    """Feed the ids as the model's output until the sequence ends; returns the unused ones."""
    rest = list(ids)
    while rest and sequence.end is None:
        endings.advance(sequence, rest.pop(0), context)
    return rest


def test_end_tokens_are_not_part_of_the_text(hf_tokenizer: Tokenizer) -> None:
    endings = endings_of(Case(vocab=1024).neox(world_size=1, stop_token_ids=[5]), hf_tokenizer, None)
    for end in (5, *(hf_tokenizer.token_id(f"<|{name}|>") for name in ("end_of_text", "eot_id", "eom_id"))):
        sequence = _sequence()
        assert _feed(sequence, [7, 8, end, 9], endings) == [9]
        assert (sequence.new, sequence.end) == ([7, 8], "stop")


def test_limits_end_a_sequence() -> None:
    sequence = _sequence(limit=2)
    _feed(sequence, [7, 8, 9], Endings(frozenset()))
    assert (sequence.new, sequence.end) == ([7, 8], "length")
    sequence = _sequence()
    _feed(sequence, [7, 8, 9], Endings(frozenset()), context=4)
    assert (sequence.new, sequence.end) == ([7, 8], "context"), "the last one is never read, so it needs no place"


@pytest.mark.parametrize("stop", ["\n\nUser:", "☉.", "o", "zu 100 % ü"])
def test_a_stop_string_is_found_wherever_tokens_cut_it(hf_tokenizer: Tokenizer, stop: str) -> None:
    text = f"Mass 1 M☉ ... {stop} and {stop}"
    endings = Endings(frozenset(), (stop, "never"), hf_tokenizer.decode)
    sequence = _sequence()
    rest = _feed(sequence, hf_tokenizer.encode(text), endings)
    assert sequence.end == "stop"
    assert endings.split(sequence) == (None, text[: text.index(stop)])
    assert rest, "the sequence ends as soon as the string is complete"
    assert stop not in hf_tokenizer.decode(sequence.new[:-1])


def test_a_trace_is_closed_when_its_budget_is_spent(hf_tokenizer: Tokenizer) -> None:
    closing = tuple(hf_tokenizer.encode("\n</think>\n\n"))
    endings = Endings(frozenset({99999}), ("stop",), hf_tokenizer.decode, thinking_budget=6, closing=closing)
    thoughts, answer = hf_tokenizer.encode("stop thinking about the stop word"), hf_tokenizer.encode("Yes. stop no")
    sequence = _sequence(trace=True)
    _feed(sequence, thoughts[:6], endings)
    assert sequence.end is None, "a stop string in a trace does not end the text"
    _feed(sequence, [99999] * len(closing), endings)  # the model's own choices are ignored
    assert sequence.new == [*thoughts[:6], *closing]
    assert sequence.closed
    _feed(sequence, answer, endings)
    trace, text = endings.split(sequence)
    assert trace == hf_tokenizer.decode(thoughts[:6]) + "\n"
    assert text == "\n\nYes. "


def test_a_trace_that_closes_itself_is_left_alone(hf_tokenizer: Tokenizer) -> None:
    endings = Endings(frozenset(), (), hf_tokenizer.decode, thinking_budget=50, closing=(1, 2, 3))
    ids = hf_tokenizer.encode("Short.\n</think>\n\nAn answer that is longer than the budget of the trace. " * 3)
    sequence = _sequence(len(ids), trace=True)
    _feed(sequence, ids, endings)
    assert sequence.new == ids
    assert not sequence.forced


TEXTS = [
    ("Mass 1 M☉, 日本 and ü.", (), False),
    ("One. User: two", ("User:",), False),
    ("One. Us two U", ("User:",), False),
    ("I think\n</thin </think>\n\nYes. END no", ("END",), True),
    ("no end of thoughts </thi", ("END",), True),
]


@pytest.mark.parametrize(("text", "stops", "trace"), TEXTS)
def test_streamed_text_equals_the_final_text(
    hf_tokenizer: Tokenizer, text: str, stops: tuple[str, ...], trace: bool
) -> None:
    """Text appears piece by piece, is never retracted, and has no partial characters or parts of a stop string."""
    endings = Endings(frozenset(), stops, hf_tokenizer.decode)
    sequence = _sequence(trace=trace)
    stream = TextStream(hf_tokenizer.decode, stops, trace)
    shown = []
    for token in hf_tokenizer.encode(text):
        if sequence.end is None:
            endings.advance(sequence, token, CONTEXT)
            shown.append(stream.add([token]))
    assert sum(bool(thoughts or answer) for thoughts, answer in shown) > 3, "it streams"
    shown.append(stream.finish())
    thoughts, answer = ("".join(parts) for parts in zip(*shown, strict=True))
    assert (thoughts, answer) == (endings.split(sequence)[0] or "", endings.split(sequence)[1])
    assert "\ufffd" not in thoughts + answer
