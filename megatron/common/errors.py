"""User errors: reported by their message only, without a traceback, with exit code 2."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """An error that the user can fix; its message says what was given, what was expected and what to do."""


class ConfigError(UserError, ValueError):
    """The configuration is invalid or contradicts itself."""


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the run; the message says which file and what to do."""


def one_line(error: BaseException) -> str:
    """An error as one line: user errors by their text, operating-system errors by file and reason, others by type."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def first_problems(problems: Sequence[str], shown: int = 3) -> str:
    """The first few of many problems in one line, and how many more there are."""
    more = f" (and {len(problems) - shown} more)" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + more
