"""What a checkpoint cannot do, said in one message that the entry points print before they exit."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit the run; the message says which file and what to do."""


def describe(error: BaseException) -> str:
    """One line for an error of a rank: operating-system errors by file and reason, others by type."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
