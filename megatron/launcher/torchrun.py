"""`python -m megatron.launcher.torchrun RANKS FOLDER SCRIPT [ARGUMENT ...]`: `torch.distributed.run` on one machine.

The same as `torchrun --standalone --nproc-per-node RANKS SCRIPT ...`, without its page of tracebacks when a rank ends
with an error: the rank itself has said what happened.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from megatron.launcher.failures import USER_ERROR
from megatron.launcher.processes import die_with_parent, shell_code
from megatron.launcher.start import GRACE_SECONDS


def main(arguments: list[str]) -> int:
    """Exit code of the first rank that failed; 0 if none did."""
    die_with_parent(os.getppid(), signal.SIGTERM)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(GRACE_SECONDS)))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    ranks, _, *command = arguments
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(["--standalone", "--nproc-per-node", ranks, *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR:  # else the rank has said all there is to say
            print(f"rank {rank} ended with exit code {failure.exitcode}; the other ranks were stopped", file=sys.stderr)
        return shell_code(failure.exitcode)
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
