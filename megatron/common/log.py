"""The output of a run: standard logging, of which only global rank 0's reaches the console.

Every module logs through `logging.getLogger(__name__)` on every rank. INFO is a line on standard output, WARNING a line
with `warning:` on standard error. A record with `extra=EVERY_RANK` is printed on whichever rank it was made.
"""

from __future__ import annotations

import logging
import sys

EVERY_RANK = {"every_rank": True}


class RankFilter(logging.Filter):
    """Passes the records of rank 0, and those marked for every rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0 or getattr(record, "every_rank", False)


class Console(logging.Handler):
    """Writes to the process's current standard streams and flushes every line."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            print(f"warning: {text}", file=sys.stderr, flush=True)
        else:
            print(text, flush=True)


def log_on_rank_0(rank: int) -> None:
    """Send the records of this project's packages to the console of rank 0; a second call replaces the first."""
    logger = logging.getLogger("megatron")
    for handler in [handler for handler in logger.handlers if isinstance(handler, Console)]:
        logger.removeHandler(handler)
    console = Console()
    console.addFilter(RankFilter(rank))
    logger.addHandler(console)
    logger.setLevel(logging.INFO)
    logging.getLogger("megatron.core").setLevel(logging.WARNING)  # the namespace is shared with megatron-core
