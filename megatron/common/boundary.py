"""The outermost function of every command: turns its errors into a last line and an exit code.

| what happened | last line | code |
|---|---|---|
| a user error (`UserError`), or the system refused a file | `COMMAND: ` and its text | 2 |
| Ctrl-C, or SIGTERM where a command asks for it | `COMMAND: interrupted` | 130 |
| the reader of the output is gone, as with `head` | nothing | 0 |
| anything else is a defect of this program | a traceback, then one line | 1 |
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from megatron.common.errors import UserError, one_line

DONE, DEFECT, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def guarded(command: str, main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run `main` and return its exit code (None is 0); its errors are reported as above under the name `command`."""
    try:
        return main() or DONE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (UserError, OSError) as error:
        print(f"{command}: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{command}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        print(f"{command}: a defect of this program, not of what you gave it: {one_line(error)}", file=sys.stderr)
        return DEFECT


def guarded_from_sigterm(command: str, main: Callable[[], int | None], interrupted: str) -> int:
    """`guarded` for a command that can be resumed: SIGTERM interrupts it like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return guarded(command, main, interrupted)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
