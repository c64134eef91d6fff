"""The error shown to users of `tools.probe`."""

from __future__ import annotations

from megatron.common.errors import UserError


class ProbeError(UserError, ValueError):
    """Vectors or labels that cannot be used; the message names the file and what was expected."""
