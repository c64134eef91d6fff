"""Errors that a user causes and can mend; the programs print their text alone, without a traceback."""


class UserError(Exception):
    """Says what was given, what was expected and what to do. Exit code 2."""


class ConfigError(UserError, ValueError):
    """The configuration cannot be right."""
