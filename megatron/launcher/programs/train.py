"""Train on the ranks that `python deepy.py train.py a.yml b.yml` (or torchrun, or srun) starts."""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

from megatron.launcher.rank_main import run  # noqa: E402
from megatron.trainer.run import train  # noqa: E402


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
