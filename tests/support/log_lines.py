"""Collects log output as lists of lines."""

from __future__ import annotations

import logging

from megatron.common.log import RankFilter


class LogLines(logging.Handler):
    """Collects the log records of this project's packages from its creation on: `lines` (INFO) and `warnings`.

    With `rank`, those that the console of that rank would print; otherwise all of this process.
    """

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.warnings: list[str] = []
        if rank is not None:
            self.addFilter(RankFilter(rank))
        logger = logging.getLogger("megatron")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        (self.warnings if record.levelno >= logging.WARNING else self.lines).append(record.getMessage())
