"""Start all ranks of this machine, wait for them, and leave no process or file behind."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from megatron.common.processes import die_with_parent, kill_group, shell_code
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.handover import write_handover
from megatron.parallel.rank_env import IGNORED_WARNINGS
from megatron.supervision.failures import REQUEUE, USER_ERROR, recorded_reason
from megatron.supervision.signals import signal_name

GRACE_SECONDS = 30.0  # from Ctrl-C or SIGTERM until ranks that have not ended are killed

_ROOT = Path(__file__).resolve().parents[2]


def start_local(script: Path, args: NeoXArgs) -> int:
    """Run `script` on the local ranks of a resolved configuration; returns the job's exit code.

    The ranks read the configuration from a file in the run's temporary folder. SIGUSR1, Ctrl-C and SIGTERM are passed
    on; ranks that have not ended GRACE_SECONDS after one of the last two are killed.
    """
    _ = args.shape  # ConfigError if the vocabulary size is unknown
    folder = Path(tempfile.mkdtemp(prefix="neox_run_"))
    try:
        handover = write_handover(args, folder)
        command = [*_command(args, folder), str(script), "--neox-args", str(handover)]
        code = supervise(command, rank_environment(args), with_input=reads_input(args))
        say_end(folder, code)
        return code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say_end(folder: Path, code: int) -> None:
    """Print the reason why a run failed as its last line, after whatever libraries have printed in the meantime."""
    if code == 0:
        return
    why = recorded_reason(folder)
    if why is None and code > 128:
        why = (
            f"by {signal_name(code - 128)}, before the run could save; rerun it to resume from its last "
            f"complete checkpoint"
        )
    why = why or f"the ranks ended with exit code {code}; their messages are above"
    print(f"deepy.py: {'' if code == USER_ERROR else 'stopped: '}{why}", file=sys.stderr, flush=True)


def local_ranks(args: NeoXArgs) -> int:
    """Number of ranks on each node."""
    return args.global_num_gpus // args.num_nodes


def reads_input(args: NeoXArgs) -> bool:
    """Whether rank 0 reads from the terminal."""
    return args.text_gen_type == "interactive"


def uses_fork(args: NeoXArgs) -> bool:
    """Whether ranks are forked from one process that imports once; with `launcher: auto`, on CPUs only."""
    return args.launcher == "fork" or (args.launcher == "auto" and args.device == "cpu")


def _command(args: NeoXArgs, folder: Path) -> list[str]:
    module = "fork" if uses_fork(args) else "torchrun"
    return [sys.executable, "-u", "-m", f"megatron.launcher.{module}", str(local_ranks(args)), str(folder)]


def rank_environment(args: NeoXArgs) -> dict[str, str]:
    """Environment variables of the ranks; the user's own settings take precedence."""
    # The project's folder comes first, so that `megatron` is found from any working directory.
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), *IGNORED_WARNINGS]))
    result["NEOX_STARTED"] = str(time.time())  # for the breakdown of the start-up time
    result.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d's long messages about peers that are gone
    result.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core: TP all-reduces start before the next GEMM
    if args.device == "cpu":
        threads = max(1, (os.cpu_count() or 1) // local_ranks(args))
        result.setdefault("OMP_NUM_THREADS", str(threads))  # each rank would take all cores
        result["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a visible GPU
    return result


def supervise(
    command: list[str],
    env: dict[str, str],
    *,
    with_input: bool = False,
    interrupt: signal.Signals = signal.SIGINT,
    repeat_warning: float | None = None,
) -> int:
    """Run `command` in its own session, forward signals, end all its processes; returns its exit code.

    It reads from the terminal only `with_input`. Ctrl-C is forwarded as `interrupt`. SIGUSR1 may be blocked by the
    caller; `command` inherits that. It is forwarded again every `repeat_warning` seconds, if given.
    """
    # In its own session, so that the terminal's Ctrl-C reaches only deepy.py, which ends the ranks in order. Even if
    # deepy.py is killed, `command` ends: an srun that outlives a requeued job would end a step of its next start.
    process = subprocess.Popen(
        command,
        env=env,
        stdin=None if with_input else subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=functools.partial(die_with_parent, os.getpid(), signal.SIGTERM),
    )
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if received:  # the second request: stop waiting
            kill_group(process.pid)
        received.append(number)
        process.send_signal(interrupt if number == signal.SIGINT else signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS + 5)

    warned, ended = False, threading.Event()

    def warn(number: int, frame: FrameType | None) -> None:
        nonlocal warned
        process.send_signal(number)
        if repeat_warning is not None and not warned:
            threading.Thread(target=warn_again, args=(repeat_warning,), daemon=True).start()
        warned = True

    def warn_again(seconds: float) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # deepy.py's are for its main thread
        while not ended.wait(seconds):
            process.send_signal(signal.SIGUSR1)

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in handled}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, warn)
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda number, frame: kill_group(process.pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    try:
        code = process.wait()
    finally:
        ended.set()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        kill_group(process.pid)
    return 128 + received[0] if received and code != REQUEUE else shell_code(code)
