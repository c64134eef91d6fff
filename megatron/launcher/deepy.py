"""The command `deepy`, and deepy.py: start a program of this project on all its ranks."""

import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

from megatron.launcher.command_line import main as run_command  # noqa: E402
from megatron.parallel.rank_env import without_compiler  # noqa: E402


def main() -> None:
    without_compiler(os.environ)  # of --dry-run, which imports megatron-core here, and of the ranks
    sys.exit(run_command(sys.argv[1:]))
