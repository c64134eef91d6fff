"""Start all ranks of this machine, wait for them, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from megatron.common.processes import kill_group, shell_code
from megatron.neox_arguments import NeoXArgs
from megatron.supervision.failures import REQUEUE

GRACE_SECONDS = 30.0  # from ctrl-C or SIGTERM until ranks that have not ended are killed

# What every rank would say: megatron-core of libraries that this project does not need, torch of a name that DeepSpeed
# and megatron-core still use.
QUIET = (
    "ignore:Transformer Engine and Apex are not installed",
    "ignore:`torch.distributed.all_gather_into_tensor` is deprecated",
    "ignore:`torch.distributed.reduce_scatter_tensor` is deprecated",
)

_ROOT = Path(__file__).resolve().parents[2]


def start(script: Path, args: NeoXArgs) -> int:
    """Run `script` on the local ranks of a resolved configuration; returns the job's exit code.

    The configuration travels as a file in a folder of the run, named by its digest. SIGUSR1, Ctrl-C and SIGTERM are
    passed on; whatever has not ended GRACE_SECONDS after one of the last two is killed.
    """
    folder = Path(tempfile.mkdtemp(prefix="neox_run_"))
    try:
        handover = write_handover(args, folder)
        return supervise([*_command(args, folder), str(script), "--neox-args", str(handover)], environment(args))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_handover(args: NeoXArgs, folder: Path) -> Path:
    """The configuration as a file whose name holds its digest, so that a rank can tell whether it read all of it."""
    path = folder / f"neox_args-{args.digest}.json"
    path.write_text(args.to_json())
    return path


def local_ranks(args: NeoXArgs) -> int:
    return args.global_num_gpus // args.num_nodes


def forks(args: NeoXArgs) -> bool:
    """Whether ranks are forked from one importing process; `launcher: auto` does so where no GPU is involved."""
    return args.launcher == "fork" or (args.launcher == "auto" and args.device == "cpu")


def _command(args: NeoXArgs, folder: Path) -> list[str]:
    module = "fork" if forks(args) else "torchrun"
    return [sys.executable, "-u", "-m", f"megatron.launcher.{module}", str(local_ranks(args)), str(folder)]


def environment(args: NeoXArgs) -> dict[str, str]:
    """The ranks' environment; what the user has set wins."""
    # The project's folder comes first, so that `megatron.launcher` is found from any working directory.
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), *QUIET]))
    result["NEOX_STARTED"] = str(time.time())  # megatron.trainer.startup says where the time to the first step went
    result.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core: TP all-reduces start before the next GEMM
    if args.device == "cpu":
        threads = max(1, (os.cpu_count() or 1) // local_ranks(args))
        result.setdefault("OMP_NUM_THREADS", str(threads))  # each rank would take all cores
        result["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a visible GPU
    return result


def supervise(command: list[str], env: dict[str, str]) -> int:
    """Run `command` in a session of its own, pass signals on, leave nothing of it behind; returns its exit code."""
    # A session of its own: the terminal's ctrl-C reaches deepy alone, which then ends the ranks in order.
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if received:  # asked twice: no more patience
            kill_group(process.pid)
        received.append(number)
        process.send_signal(signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS + 5)

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in handled}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: process.send_signal(number))
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda number, frame: kill_group(process.pid))
    try:
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        kill_group(process.pid)
    return 128 + received[0] if received and code != REQUEUE else shell_code(code)
