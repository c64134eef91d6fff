"""Waiting for something that another process does, with a time limit."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any


def wait_until(
    condition: Callable[[], bool],
    what: str,
    seconds: float,
    process: subprocess.Popen[Any] | None = None,
    output: Callable[[], str] = str,
    every: float = 0.02,
) -> None:
    """Return once `condition` holds, which is tried `every` so many seconds.

    AssertionError with `output()` if `seconds` pass before, or if `process` ends.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with code {process.returncode} before {what}\n{output()}")
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s for {what}\n{output()}")
        time.sleep(every)
