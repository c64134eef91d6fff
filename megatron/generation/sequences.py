"""A sequence that is being continued, the conditions that end it, and its text as it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron.generation.sampling import RandomNumbers
from megatron.tokenizer.conversation import THINK_END

End = Literal["stop", "length", "context"]
"""Why a sequence ended: a stop id or string, the limit on new tokens, a full context."""


@dataclass
class Continuation:
    """The token ids of a prompt, and the new ids after them.

    `number` identifies the prompt in a run, `sample` the sample of this prompt. `limit` is the maximum number of new
    tokens; `random` has a random number for each, None without sampling. `forced` holds tokens that come next, whatever
    the model chooses.
    """

    number: int
    sample: int
    prompt: list[int]
    limit: int
    random: RandomNumbers | None = None
    trace: bool = False  # the prompt opens a reasoning trace
    new: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    closed: bool = False  # the trace has ended
    end: End | None = None
    started: float = 0.0  # time.perf_counter() when the first chunk of its prompt was planned

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.new)


@dataclass(frozen=True)
class Endings:
    """What ends a sequence: the tokens `ids` and the strings `strings`, which are not part of the result.

    After `thinking_budget` new tokens in an open trace, the tokens `closing` are forced.
    """

    ids: frozenset[int]
    strings: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None  # needed for strings and for traces
    thinking_budget: int | None = None
    closing: tuple[int, ...] = ()

    def advance(self, sequence: Continuation, token: int, context: int) -> None:
        """Append the model's `token`, or a forced one instead; set `end` if the sequence ends with it."""
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
        """Split the new text into (trace, answer), the answer cut before a stop string.

        The trace is None if the prompt opens none; if it is not closed, the whole text is trace.
        """
        assert self.decode is not None
        trace, text = None, self.decode(sequence.new)
        if sequence.trace:
            trace, _, text = text.partition(THINK_END)
        return trace, text[: first_of(self.strings, text)]

    def _ends_in_string(self, sequence: Continuation) -> bool:
        if sequence.trace and not sequence.closed:
            return False  # a trace may contain stop strings
        return any(string in self._tail(sequence, string) for string in self.strings)

    def _tail(self, sequence: Continuation, string: str) -> str:
        """The end of the text, which contains `string` if the last token completes it: a token is at least a byte."""
        assert self.decode is not None
        return self.decode(sequence.new[-(len(string.encode()) + 1) :])


def first_of(strings: Sequence[str], text: str) -> int:
    """Index in `text` of the first occurrence of any of `strings`; its length if there is none."""
    return min((text.find(string) for string in strings if string in text), default=len(text))


class TextStream:
    """Streams the text of a growing sequence: each call returns the new text that is certain, as (thoughts, answer).

    Incomplete characters, and text that may be the beginning of a stop string, are held back.
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
        """The rest of the text, when no more ids come."""
        return self._certain(last=True)

    def _certain(self, last: bool) -> tuple[str, str]:
        known, whole = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if whole.endswith("\ufffd") and not last:
            return "", ""
        # Keep the previous call's tokens in front: some vocabularies decode the first token of a text differently.
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
        """Length of the kept text that cannot be part of one of `strings` still to be completed."""
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
