"""A sequence that is being continued, and when it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron.generation.sampling import RandomNumbers
from megatron.tokenizer.conversation import THINK_END

End = Literal["stop", "length", "context"]
"""Why a sequence ended: a stop id or string, the limit of new tokens, a full context."""


@dataclass
class Continuation:
    """A prompt's ids and the new ids behind them.

    `number` tells the prompts of a run apart, `sample` those of a prompt; `limit` is how many new tokens there may be,
    and `random` has a number for each where tokens are sampled. `forced` are tokens that come next whatever the model
    says.
    """

    number: int
    sample: int
    prompt: list[int]
    limit: int
    random: RandomNumbers | None = None
    trace: bool = False  # the prompt opens a trace of thoughts
    new: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    closed: bool = False  # the trace has ended
    end: End | None = None
    started: float = 0.0  # when its prompt began to be read, by time.perf_counter

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.new)


@dataclass(frozen=True)
class Endings:
    """What ends a sequence. An id of `ids` is not part of the result, nor is a string of `strings`.

    After `thinking_budget` new tokens in an open trace, `closing` is forced upon the model.
    """

    ids: frozenset[int]
    strings: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None  # needed for strings and for traces
    thinking_budget: int | None = None
    closing: tuple[int, ...] = ()

    def advance(self, sequence: Continuation, token: int, context: int) -> None:
        """Add the model's `token`, or the one that is forced; set `end` if it is the last one."""
        forced = bool(sequence.forced)
        token = sequence.forced.popleft() if forced else token
        if token in self.ids and not forced:
            sequence.end = "stop"
            return
        sequence.new.append(token)
        if self._ends_in_string(sequence):
            sequence.end = "stop"
        elif len(sequence.new) == sequence.limit:
            sequence.end = "length"
        elif sequence.length > context:
            sequence.end = "context"
        elif sequence.trace and not sequence.closed:
            sequence.closed = THINK_END in self._tail(sequence, THINK_END)
            if not sequence.closed and len(sequence.new) == self.thinking_budget:
                sequence.forced.extend(self.closing)

    def split(self, sequence: Continuation) -> tuple[str | None, str]:
        """(trace, answer): the new text cut before a stop string; the trace is None where the prompt opens none.

        If the trace is not closed, all is trace.
        """
        assert self.decode is not None
        trace, text = None, self.decode(sequence.new)
        if sequence.trace:
            trace, _, text = text.partition(THINK_END)
        return trace, text[: first_of(self.strings, text)]

    def _ends_in_string(self, sequence: Continuation) -> bool:
        if sequence.trace and not sequence.closed:
            return False  # thoughts may contain what ends an answer
        return any(string in self._tail(sequence, string) for string in self.strings)

    def _tail(self, sequence: Continuation, string: str) -> str:
        """Text that holds `string` if the last token completes it: a token is at least a byte."""
        assert self.decode is not None
        return self.decode(sequence.new[-(len(string.encode()) + 1) :])


def first_of(strings: Sequence[str], text: str) -> int:
    """Where the first of `strings` begins in `text`; its length where there is none."""
    return min((text.find(string) for string in strings if string in text), default=len(text))


class TextStream:
    """Text of a sequence while it grows: each call gives (thoughts, answer) that have become certain.

    Kept back are bytes that are no whole character yet, and what may be the beginning of a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], strings: Sequence[str] = (), trace: bool = False):
        self._decode, self._strings, self._trace = decode, tuple(strings), trace
        self._ids: list[int] = []
        self._start = self._read = 0
        self._kept = ""

    def add(self, ids: Sequence[int]) -> tuple[str, str]:
        self._ids += ids
        return self._certain(last=False)

    def finish(self) -> tuple[str, str]:
        """The rest, when no more ids come."""
        return self._certain(last=True)

    def _certain(self, last: bool) -> tuple[str, str]:
        known, whole = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if whole.endswith("\ufffd") and not last:
            return "", ""
        # The tokens of the last call stay in front: some vocabularies write the first token of a text differently.
        self._start, self._read = self._read, len(self._ids)
        self._kept += whole[len(known) :]
        thoughts = ""
        if self._trace:
            thoughts = self._give(min(first_of([THINK_END], self._kept), self._safe([THINK_END], last)))
            if not self._kept.startswith(THINK_END):
                return thoughts, ""
            self._kept, self._trace = self._kept.removeprefix(THINK_END), False
        end = first_of(self._strings, self._kept)
        return thoughts, self._give(min(end, self._safe(self._strings, last)))

    def _safe(self, strings: Sequence[str], last: bool) -> int:
        """Up to where the kept text cannot be the beginning of one of `strings`."""
        if last:
            return len(self._kept)
        begins = (
            len(self._kept) - size
            for string in strings
            for size in range(1, len(string))
            if self._kept.endswith(string[:size])
        )
        return min(begins, default=len(self._kept))

    def _give(self, length: int) -> str:
        given, self._kept = self._kept[:length], self._kept[length:]
        return given
