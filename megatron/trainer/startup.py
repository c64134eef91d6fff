"""Where the time from `python deepy.py` to the first optimizer step goes."""

from __future__ import annotations

import os
import time

from megatron.supervision.status_store import Whereabouts

STARTED = "NEOX_STARTED"  # set by the launcher: time.time() when deepy.py began


class StartUp:
    """Named spans that follow each other without a gap, from the command line to the first step."""

    def __init__(self, whereabouts: Whereabouts) -> None:
        self._whereabouts = whereabouts
        self._last = float(os.environ.get(STARTED, time.time()))
        self.spans: dict[str, float] = {}

    def done(self, what: str) -> None:
        """The span that ends now is called `what`."""
        now = time.time()
        self.spans[what] = now - self._last
        self._last = now
        self._whereabouts.at(f"start-up, after {what}")

    def line(self) -> str:
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self.spans.items())
        return f"{sum(self.spans.values()):.1f} s to the end of the first step: {parts}"
