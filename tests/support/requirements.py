"""Tools that some machines lack: a test that needs one is skipped, or fails if NEOX_REQUIRE names it (as in CI)."""

from __future__ import annotations

import os

import pytest


def need(tool: str, present: bool, how: str) -> None:
    """Return if `tool` is present; otherwise skip the test, or fail it if NEOX_REQUIRE lists the tool."""
    if present:
        return
    message = f"{tool} is missing: {how}"
    if tool in os.environ.get("NEOX_REQUIRE", "").split(","):
        pytest.fail(message)
    pytest.skip(message)
