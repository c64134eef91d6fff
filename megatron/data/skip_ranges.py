"""Samples that a run leaves out of its order, such as the text behind a loss spike.

Positions are places in the order of the run, counted from 0; a range [first, end) holds first to end - 1. Adding or
removing ranges does not move a position: only what lies ahead changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class SampleRanges:
    """Ranges to leave out (0 <= first < end, a rule of the keys): sorted, merged where they touch or overlap."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self.ranges: list[tuple[int, int]] = []
        for first, end in sorted(tuple(pair) for pair in ranges):
            if self.ranges and first <= self.ranges[-1][1]:
                self.ranges[-1] = (self.ranges[-1][0], max(end, self.ranges[-1][1]))
            else:
                self.ranges.append((first, end))

    def place(self, position: int, count: int) -> int:
        """Position of the `count`-th sample (from 0) that is read from `position` on."""
        place = position + count
        for first, end in self.ranges:
            if first > place:
                break
            place += max(0, end - max(first, position))
        return place

    def after(self, position: int, samples: int) -> int:
        """The position after `samples` samples that are read from `position` on."""
        return position if samples == 0 else self.place(position, samples - 1) + 1

    def kept(self, position: int, end: int) -> int:
        """How many samples of [position, end) are read."""
        return max(0, end - position) - sum(b - a for a, b in self.between(position, end))

    def between(self, position: int, end: int) -> list[tuple[int, int]]:
        """The parts of the ranges that lie in [position, end)."""
        cut = [(max(first, position), min(last, end)) for first, last in self.ranges]
        return [(first, last) for first, last in cut if first < last]
