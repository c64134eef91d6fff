"""The one error a user of the configuration can meet."""


class ConfigError(ValueError):
    """The configuration cannot be right; the message says what was given, what was expected and what to do."""
