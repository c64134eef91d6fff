"""Progress lines at regular time intervals, so that the first one comes soon."""

from __future__ import annotations

import time

SECONDS = 10.0  # between lines


class Progress:
    """Decides when a line is due, and gives the fraction of the input read and the estimated time left."""

    def __init__(self, total: int, every: int | None = None) -> None:
        """`total` is the size of the input in bytes; `every` also asks for a line after this many items."""
        self.total, self.every, self.read = total, every, 0
        self.start = self._last = time.monotonic()
        self._next = every or 0
        self._read_before: int | None = None

    def due(self, items: int) -> bool:
        """Whether to print now; `items` are done."""
        now = time.monotonic()
        if self._read_before is None:  # blocks skipped on resuming must not count toward the speed
            self._read_before = self.read
        if now - self._last < SECONDS and (self.every is None or items < self._next):
            return False
        self._last = now
        self._next = items + (self.every or 0)
        return True

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)

    def left(self) -> str:
        """`34% of the input, 5 min left`."""
        share = min(1.0, self.read / max(self.total, 1))
        done = (self.read - (self._read_before or 0)) / max(self.total, 1)
        words = f"{share:.0%} of the input"
        if done <= 0 or share >= 1:
            return words
        seconds = self.seconds * (1 - share) / done
        return f"{words}, {f'{seconds / 60:.0f} min' if seconds >= 90 else f'{seconds:.0f} s'} left"
