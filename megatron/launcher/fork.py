"""`python -m megatron.launcher.fork RANKS FOLDER SCRIPT [ARGUMENT ...]`: local ranks forked from one process.

Importing torch, DeepSpeed and megatron-core costs 5 s of CPU time per process. Eight ranks that import separately on
two cores need 20 s and more; forked from one process that has imported once, they need a few seconds. No thread and no
process group may exist before the fork, which rules out torch's elastic agent (it starts the threads of a store first).
Ranks rendezvous through a file in FOLDER.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType

from megatron.common.imports import slow_imports
from megatron.common.processes import die_with_parent, how_it_ended, shell_code
from megatron.launcher.local import GRACE_SECONDS
from megatron.parallel.rank_env import TYPED, node_name
from megatron.supervision.failures import LOST, REQUEUE, claim_failure

FAILURE_GRACE_SECONDS = 10.0  # how long the other ranks may keep running after the first failure
PRELOAD = ("torch", "deepspeed", "megatron.core.tensor_parallel", "megatron.engine.deepspeed", "megatron.tokenizer.hf")

Rank = multiprocessing.context.ForkProcess


class _Stop(BaseException):
    """SIGTERM or Ctrl-C arrived. Not an InterruptedError, which `wait` would swallow."""


def _rank(rank: int, ranks: int, folder: Path, command: list[str], parent: int) -> None:
    """Body of a forked rank: run the script as `__main__`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A warning signal during start-up stays blocked until StopRequest handles it; it never kills a program without one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    die_with_parent(parent, signal.SIGKILL)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        NEOX_RENDEZVOUS=f"file://{folder}/rendezvous",
    )
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends with os._exit, which skips the exit handlers of libraries


def preload() -> None:
    """Import what every rank needs, before they are forked."""
    for name in PRELOAD:
        importlib.import_module(name)


def main(arguments: list[str]) -> int:
    """Fork the ranks and wait; returns the exit code of the first rank that failed, 0 if none did."""
    os.environ[TYPED] = str(os.dup(0))  # multiprocessing closes a child's stdin
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine, whatever its name resolves to
    die_with_parent(os.getppid(), signal.SIGTERM)
    ranks, folder, command = int(arguments[0]), Path(arguments[1]), arguments[2:]

    # SIGINT and SIGTERM stop the ranks, SIGUSR1 is passed on to them.
    stop: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.append(number)
        raise _Stop

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    running: dict[int, Rank] = {}
    warned: list[int] = []

    def on_warning(number: int, frame: FrameType | None) -> None:
        warned.append(number)
        _send(dict(running), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, on_warning)

    # Import once, fork, wait.
    failed: list[int] = []
    try:
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        with slow_imports():
            preload()
            runpy.run_path(command[0], run_name="__preload__")  # runs the script's imports only
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # deepy.py and the script block earlier ones
        assert threading.active_count() == 1, f"threads before the fork: {threading.enumerate()}"
        context = multiprocessing.get_context("fork")
        for rank in range(ranks):
            process = context.Process(target=_rank, args=(rank, ranks, folder, command, os.getpid()))
            process.start()
            running[rank] = process
            if warned:
                _send({rank: process}, signal.SIGUSR1)
        _watch(running, failed, folder, deadline=None)
    except _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _send(running, stop[0])
        _watch(running, failed, folder, deadline=time.monotonic() + GRACE_SECONDS)
    if REQUEUE in failed:
        return REQUEUE
    if stop:
        return 128 + stop[0]
    return shell_code(failed[0]) if failed else 0


def _send(running: dict[int, Rank], number: int) -> None:
    for process in running.values():
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _watch(running: dict[int, Rank], failed: list[int], folder: Path, deadline: float | None) -> None:
    """Wait until no rank runs. After a failure the others get time to end, then SIGTERM, then SIGKILL.

    Codes of failed ranks are appended to `failed`. A `deadline` (monotonic seconds) means that SIGTERM was sent.
    """
    kill_next = deadline is not None  # whether SIGKILL follows at the deadline, without another SIGTERM
    while running:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = wait([process.sentinel for process in running.values()], timeout)
        if not ended and kill_next:
            for process in running.values():
                process.kill()
            deadline = None
        elif not ended:
            _send(running, signal.SIGTERM)
            kill_next, deadline = True, time.monotonic() + FAILURE_GRACE_SECONDS
        for rank, process in list(running.items()):
            if process.sentinel not in ended:
                continue
            process.join()
            del running[rank]
            code = process.exitcode or 0
            if code and not failed and not kill_next:
                end = f"rank {rank} on {node_name(os.environ)} {how_it_ended(code)}"
                # So that the others do not report it as lost; deepy.py reports it at the end.
                claim_failure(folder, shell_code(code), f"{end}; the other ranks were stopped")
                deadline = time.monotonic() + FAILURE_GRACE_SECONDS
                kill_next = code == LOST  # ranks that can end on their own do so; hung ones ignore SIGTERM
            if code:
                failed.append(code)


if __name__ == "__main__":
    ended_with = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended_with)  # to take the modules apart would take 0.7 s
