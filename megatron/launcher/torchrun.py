"""`python -m megatron.launcher.torchrun RANKS FOLDER SCRIPT [ARGUMENT ...]`: `torch.distributed.run` on one machine.

The same as `torchrun --standalone --nproc-per-node RANKS SCRIPT ...`, but without a port that other machines can reach,
and without its page of tracebacks when a rank fails: the rank itself has reported the error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from megatron.common.processes import children, die_with_parent, how_it_ended, shell_code
from megatron.launcher.local import GRACE_SECONDS
from megatron.parallel.rank_env import node_name
from megatron.supervision.failures import REQUEUE, claim_failure, recorded_code


def main(arguments: list[str]) -> int:
    """Run the ranks and wait; returns the exit code of the first rank that failed, 0 if none did."""
    die_with_parent(os.getppid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(GRACE_SECONDS)))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    ranks, folder, *command = arguments
    # Agent and ranks rendezvous through files in the run's folder: torch's TCP stores listen on every interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["NEOX_RENDEZVOUS"] = f"file://{folder}/rendezvous"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{folder}/agents", "--rdzv-conf", "store_type=file"]
    threading.Thread(target=_pass_on, daemon=True).start()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args([*meeting, "--rdzv-id", "neox", "--nnodes", "1", "--nproc-per-node", ranks, *command]))
    except ChildFailedError as error:
        if recorded_code(Path(folder)) == REQUEUE:
            return REQUEUE
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        end = f"rank {rank} on {node_name(os.environ)} {how_it_ended(code)}; the other ranks were stopped"
        claim_failure(Path(folder), shell_code(code), end)  # if it did not report by itself
        return shell_code(code)
    except SignalException as stop:
        return REQUEUE if recorded_code(Path(folder)) == REQUEUE else 128 + stop.sigval
    return 0


def _pass_on() -> None:
    """Pass Slurm's warnings to the ranks; torch's agent would exit at once.

    This thread waits for the signal, which is blocked in all others, so that the ranks start with it blocked.
    """
    while True:
        number = signal.sigwait({signal.SIGUSR1})
        for child in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
