"""Groups of sequences that are decoded together, and the plan of each group's next forward pass.

Every rank of a pipeline plans by itself: all have the same sequences and receive the same tokens, so they make the same
plans, and no plan needs to be sent. Running sequences occupy the slots 0, 1, ... of their group's cache: when one ends,
the sequence in the last slot moves to its slot, and new sequences join at the end.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.generation.sequences import Continuation, Endings
from megatron.model.cache import CachedTokens, KeyValueCache


@dataclass(frozen=True)
class Pass:
    """One forward pass of a group: its tokens [b, s], and the sequences for which tokens are chosen, by output."""

    ids: Tensor
    tokens: CachedTokens
    chosen: list[Continuation]


class SequenceGroup:
    """At most `slots` sequences, each of at most `context` tokens."""

    def __init__(self, slots: int, context: int, chunk: int, device: torch.device) -> None:
        self.slots, self.context, self.chunk, self.device = slots, context, chunk, device
        self.cache = KeyValueCache(slots, context)
        self.running: list[Continuation] = []  # by slot
        self._reading: list[Continuation] = []  # the tail of `running`, whose prompts are still being read
        self._read = 0  # number of tokens read of each of these prompts
        self._held: list[int] = []  # tokens of a finished sequence that are still in the first slot of an idle group

    @property
    def idle(self) -> bool:
        return not self.running

    def plan(self, queue: deque[Continuation], share: int) -> Pass | None:
        """The next forward pass, None if there is nothing to do. New sequences are taken from the queue.

        `share` limits this group's number of sequences, so that all groups have work. Prompts are read in chunks and
        sorted by length, the longest first, so that those with tokens left occupy adjacent slots.
        """
        room = min(self.slots, share) - len(self.running)
        # Running sequences wait while prompts are read, so several must join at once; an idle group takes any number.
        wanted = min(len(queue), max(1, self.slots // 4)) if self.running else 1
        if not self._reading and queue and room >= wanted:
            joining = [queue.popleft() for _ in range(min(room, len(queue)))]
            for sequence in joining:
                sequence.started = time.perf_counter()
            self._reading = sorted(joining, key=lambda s: -len(s.prompt))
            self._read = 0 if self.running or len(joining) > 1 else self._known(joining[0].prompt)
            self.running += self._reading
            self._held = []
        if self._reading:
            return self._read_chunk()
        return self._decode() if self.running else None

    def advance(self, work: Pass, tokens: list[int], endings: Endings) -> list[Continuation]:
        """Add the chosen tokens; returns the sequences that have ended, which leave the group."""
        for sequence, token in zip(work.chosen, tokens, strict=True):
            endings.advance(sequence, token, self.context)
        ended = [sequence for sequence in self.running if sequence.end is not None]
        if not self._reading:
            self._remove_ended()
        return [sequence for sequence in ended if sequence in work.chosen]

    def _known(self, prompt: list[int]) -> int:
        """Number of the prompt's tokens that the first slot already holds: earlier turns of a conversation. The last
        token does not count: it is read again for its logits."""
        equal = (a == b for a, b in zip(self._held, prompt[:-1], strict=False))
        return next((place for place, same in enumerate(equal) if not same), min(len(self._held), len(prompt) - 1))

    def _read_chunk(self) -> Pass:
        start = self._read
        left = [s for s in self._reading if len(s.prompt) > start]
        s = min(self.chunk, len(left[0].prompt) - start)
        ids = torch.zeros(len(left), s, dtype=torch.int64)
        for row, sequence in enumerate(left):
            part = sequence.prompt[start : start + s]
            ids[row, : len(part)] = torch.tensor(part)
        outputs = [
            (row, len(sequence.prompt) - 1 - start)
            for row, sequence in enumerate(left)
            if len(sequence.prompt) <= start + s
        ]
        first = len(self.running) - len(self._reading)
        tokens = CachedTokens(self.cache, first, [start] * len(left), s, outputs, self.device)
        self._read += s
        if self._read >= len(left[0].prompt):
            self._reading = []
        return Pass(ids.to(self.device), tokens, [left[row] for row, _ in outputs])

    def _decode(self) -> Pass:
        last = torch.tensor([[s.new[-1]] for s in self.running], dtype=torch.int64)
        outputs = [(row, 0) for row in range(len(self.running))]
        starts = [s.length - 1 for s in self.running]
        tokens = CachedTokens(self.cache, 0, starts, 1, outputs, self.device)
        return Pass(last.to(self.device), tokens, list(self.running))

    def _remove_ended(self) -> None:
        if len(self.running) == 1 and self.running[0].end is not None:
            self._held = [*self.running[0].prompt, *self.running[0].new][:-1]  # the last token may not have been read
        for slot in reversed(range(len(self.running))):
            if self.running[slot].end is not None:
                last = len(self.running) - 1
                if slot != last:
                    self.cache.move(last, slot)
                    self.running[slot] = self.running[last]
                self.running.pop()
