"""What every data command does around its work: user errors and interruptions end it with one message and a code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from megatron.common.errors import UserError, one_line

USER_ERROR, INTERRUPTED = 2, 130


def run_command(name: str, work: Callable[[], None], interrupted: str = "stopped") -> int:
    """The exit code: 0 done, 2 for input that cannot be used, 130 for ctrl-C. The message is the last line."""
    try:
        work()
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0
