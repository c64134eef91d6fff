"""The error shown to users: what was given, what was expected, what to do."""

from megatron.common.errors import UserError


class MergeError(UserError, ValueError):
    """A recipe or parents that cannot be merged; the command prints the message and exits with code 2."""
