#!/usr/bin/env python
"""Start a program of this project on all its ranks: python deepy.py train.py model.yml run.yml [--key value ...]"""

import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning waits until somebody listens

from megatron.launcher.command_line import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
