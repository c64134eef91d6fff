"""`python -m megatron.launcher.fork RANKS FOLDER SCRIPT [ARGUMENT ...]`: local ranks forked from one process.

Importing torch, DeepSpeed and megatron-core costs 7 to 8 s of CPU a process: eight ranks that import for themselves
on two cores wait a minute for it, ranks forked from one process that has imported once wait a few seconds. No thread
and no process group exists before the fork, which is why torch's elastic agent (it starts a store's threads first) is
not used here. Ranks meet through a file in FOLDER.
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

from megatron.common.processes import die_with_parent, how_it_ended, shell_code
from megatron.launcher.start import GRACE_SECONDS
from megatron.parallel.rank_env import node_name
from megatron.supervision.failures import LOST, REQUEUE, USER_ERROR, claim_failure

FAILURE_GRACE_SECONDS = 10.0  # how long the others may run on once one rank has failed
PRELOAD = ("torch", "deepspeed", "megatron.core.tensor_parallel")

Rank = multiprocessing.context.ForkProcess


class _Stop(BaseException):
    """SIGTERM arrived. Not an InterruptedError, which `wait` would swallow."""


def _rank(rank: int, ranks: int, folder: Path, command: list[str], parent: int) -> None:
    """Body of a forked rank: the script as `__main__`, as if it had been started alone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A warning that comes during start-up waits until the training listens (StopRequest); a program that never does
    # is not ended by it.
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
        atexit._run_exitfuncs()  # multiprocessing leaves by os._exit, which would skip what libraries registered


def _preload(script: str) -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    runpy.run_path(script, run_name="__preload__")  # what the script imports, without what it does


def main(arguments: list[str]) -> int:
    """Exit code of the first rank that failed; 0 if none did."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here, whatever the host's name resolves to
    die_with_parent(os.getppid(), signal.SIGTERM)
    ranks, folder, command = int(arguments[0]), Path(arguments[1]), arguments[2:]
    stop: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.append(number)
        raise _Stop

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_signal)
    running: dict[int, Rank] = {}

    warned: list[int] = []

    def on_warning(number: int, frame: FrameType | None) -> None:
        warned.append(number)
        for process in list(running.values()):
            _warn(process)

    signal.signal(signal.SIGUSR1, on_warning)
    failed: list[int] = []
    try:
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        _preload(command[0])
        assert threading.active_count() == 1, f"threads before the fork: {threading.enumerate()}"
        context = multiprocessing.get_context("fork")
        for rank in range(ranks):
            process = context.Process(target=_rank, args=(rank, ranks, folder, command, os.getpid()))
            process.start()
            running[rank] = process
            if warned:
                _warn(process)
        _watch(running, failed, folder, deadline=None)
    except _Stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _terminate(running)
        _watch(running, failed, folder, deadline=time.monotonic() + GRACE_SECONDS)
    if REQUEUE in failed:
        return REQUEUE
    if stop:
        return 128 + stop[0]
    return shell_code(failed[0]) if failed else 0


def _warn(process: Rank) -> None:
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)


def _terminate(running: dict[int, Rank]) -> None:
    for process in running.values():
        process.terminate()


def _watch(running: dict[int, Rank], failed: list[int], folder: Path, deadline: float | None) -> None:
    """Wait until no rank runs. After a failure the others get time to end, then SIGTERM, then SIGKILL."""
    asked = deadline is not None
    while running:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = wait([process.sentinel for process in running.values()], timeout)
        if not ended and asked:
            for process in running.values():
                process.kill()
            deadline = None
        elif not ended:
            _terminate(running)
            asked, deadline = True, time.monotonic() + FAILURE_GRACE_SECONDS
        for rank, process in list(running.items()):
            if process.sentinel not in ended:
                continue
            process.join()
            del running[rank]
            code = process.exitcode or 0
            if code and not failed and not asked:
                said = f"rank {rank} on {node_name(os.environ)} {how_it_ended(code)}"
                claim_failure(folder, shell_code(code), said)  # the others need not say that they lost this one
                if code not in (USER_ERROR, REQUEUE, LOST):  # else the rank has said all there is to say
                    print(f"{said}; the other ranks are stopped", file=sys.stderr, flush=True)
                deadline = time.monotonic() + FAILURE_GRACE_SECONDS
                asked = code == LOST  # then nobody is waited for but who cannot end by itself
            if code:
                failed.append(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
