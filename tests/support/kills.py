"""Kills or disturbs work before any chosen one of its file-system operations."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


CHANGES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open")


def killed_at(
    operation: int, work: Callable[[], None], how: Callable[[], None] = kill_itself, calls: Sequence[str] = CHANGES
) -> bool:
    """Run `work` in a child that kills itself before its `operation`-th call of `os` in `calls`; True if it got there.

    With another `how`, that is called there instead, and the work must complete.
    """
    child = os.fork()
    if child == 0:
        done = 0
        for name in calls:
            original = getattr(os, name)

            def counted(*args: Any, _original: Any = original, **keys: Any) -> Any:
                nonlocal done
                done += 1
                if done == operation:
                    how()
                return _original(*args, **keys)

            setattr(os, name, counted)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(2)
        os._exit(0 if done < operation else 3)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 3, -signal.SIGKILL), "the work itself failed"
    return code != 0
