"""The error shown to users: what was given, what was expected, what to do."""

from megatron.common.errors import UserError


class ConvertError(UserError, ValueError):
    """Bad input or an impossible request; the command prints the message and exits with code 2."""
