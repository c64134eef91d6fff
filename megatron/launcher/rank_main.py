"""A rank's main function: run a program with the rank's configuration, and report once per run how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron.common.errors import ConfigError, UserError
from megatron.common.processes import die_with_parent
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.registry import Task
from megatron.parallel.handover import rank_args
from megatron.parallel.rank_env import find_started_rank, node_name
from megatron.supervision.failures import (
    FAILURE,
    LOST,
    USER_ERROR,
    LostRanks,
    Stopped,
    claim,
    claim_failure,
    claim_loss,
    code_after,
    code_of_first_failure,
    is_about_a_lost_peer,
    recorded_reason,
    reported_by_launcher,
    run_folder,
)

AFTER_FIRST_FAILURE_SECONDS = 0.5  # ranks that fail as a consequence end later, so that the launcher names the first


def _first_reason(folder: Path | None) -> str | None:
    """The message of the rank that failed first, which may still be writing it."""
    deadline = time.monotonic() + AFTER_FIRST_FAILURE_SECONDS
    while folder is not None and time.monotonic() < deadline:
        if (reason := recorded_reason(folder)) is not None:
            return reason
        time.sleep(0.01)
    return None


def run(program: Callable[[NeoXArgs], object], task: Task = "train") -> NoReturn:
    """Run `program(rank_args())`, then end the process.

    Exit codes: 0; 2 for a UserError, whose text is printed once per run, without a traceback; `Stopped.code` for an
    orderly early end; 76 (LOST) if other ranks died or hang; 1 for any other exception. The first rank to fail prints
    its traceback; ranks that fail because it is gone print nothing. Under deepy.py the first reason is stored in the
    run's folder, and deepy.py prints it last.
    """
    code, folder = FAILURE, run_folder(sys.argv[1:])
    launched = reported_by_launcher(sys.argv[1:])
    if launched:
        die_with_parent(os.getppid(), signal.SIGKILL)
    try:
        program(rank_args(task=task))
        code = 0
    except UserError as error:
        code = USER_ERROR
        text = f"error: {error}"
        claim_failure(folder, code, text)
        said = claim(folder, "said-" + hashlib.sha256(text.encode()).hexdigest())
        if said and not (launched and _first_reason(folder) == text):
            print(text, file=sys.stderr)
    except Stopped as stop:
        code = stop.code
        first = claim_failure(folder, code, str(stop))
        if first and not launched and (folder is not None or _rank() == 0):
            print(f"stopped: {stop}", file=sys.stderr)
        _close_process_group()  # safe, since all ranks stop together and none has failed
    except LostRanks as lost:
        if claim_loss(folder, lost):
            code = LOST
            if not launched:
                print(f"stopped: {lost}", file=sys.stderr)
        else:
            code = code_after(folder)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        claim_failure(folder, code, "by Ctrl-C, before the run could save")
    except Exception as error:
        code = _unexpected(error, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Destructors of process groups can wait for peers that wait for this rank: skip them.
        os._exit(code)
    _close_process_group()
    sys.exit(0)


def _unexpected(error: Exception, folder: Path | None) -> int:
    """Report an unexpected error, unless it only follows from another rank's failure; returns the exit code."""
    rank, happened = _rank(), "failed"
    if is_about_a_lost_peer(error):
        first = code_of_first_failure(folder)
        if first is not None:
            time.sleep(AFTER_FIRST_FAILURE_SECONDS)
            return first
        happened = "lost another rank, which reported nothing"
    what = f"rank {rank} on {node_name(os.environ)} {happened}: {type(error).__name__}: {error}"
    if claim_failure(folder, FAILURE, what):
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
    else:
        print(f"rank {rank} failed as well: {type(error).__name__}: {error}", file=sys.stderr)
    return FAILURE


def _rank() -> int:
    with contextlib.suppress(ConfigError):  # contradictory variables, already reported
        started = find_started_rank(os.environ)
        return 0 if started is None else started.rank
    return 0


def _close_process_group() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
