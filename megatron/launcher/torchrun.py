"""`python -m megatron.launcher.torchrun RANKS FOLDER SCRIPT [ARGUMENT ...]`: `torch.distributed.run` on one machine.

The same as `torchrun --standalone --nproc-per-node RANKS SCRIPT ...`, without its page of tracebacks when a rank fails:
the rank itself has reported the error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from megatron.common.processes import children, die_with_parent, how_it_ended, shell_code
from megatron.launcher.local import GRACE_SECONDS
from megatron.parallel.rank_env import node_name
from megatron.supervision.failures import LOST, REQUEUE, USER_ERROR, recorded_code


def main(arguments: list[str]) -> int:
    """Exit code of the first rank that failed; 0 if none did."""
    die_with_parent(os.getppid(), signal.SIGTERM)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(GRACE_SECONDS)))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    ranks, folder, *command = arguments
    signal.signal(signal.SIGUSR1, _pass_on)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(["--standalone", "--nproc-per-node", ranks, *command]))
    except ChildFailedError as error:
        if recorded_code(Path(folder)) == REQUEUE:
            return REQUEUE
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code not in (USER_ERROR, LOST):  # these have been reported by the rank
            end = f"rank {rank} on {node_name(os.environ)} {how_it_ended(code)}"
            print(f"{end}; the other ranks were stopped", file=sys.stderr)
        return shell_code(code)
    except SignalException as stop:
        return REQUEUE if recorded_code(Path(folder)) == REQUEUE else 128 + stop.sigval
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Pass Slurm's warning to the ranks; torch's agent would exit at once."""
    for child in children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
