"""Termination of processes: no process may outlive its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, deadly: signal.Signals) -> None:
    """Have Linux send this process a signal when its parent (process id `parent`) ends, even by kill -9.

    On other systems nothing happens, and only orderly ends propagate.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(deadly))
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), deadly)


def children(parent: int) -> list[int]:
    """Process ids of a process's children, from Linux's /proc; elsewhere none."""
    found: list[int] = []
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def kill_group(leader: int) -> None:
    """Kill what is left of a process group; usually nothing is."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """`was killed by SIGKILL` or `ended with exit code 1`; `code` is negative for a signal."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def shell_code(code: int) -> int:
    """Exit code as reported by a shell: 128 + the signal's number for a killed process."""
    return 128 - code if code < 0 else code
