"""Train on the ranks that `python deepy.py train.py a.yml b.yml` (or torchrun, or srun) starts."""

import signal

from megatron.common.imports import slow_imports

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

with slow_imports():
    from megatron.launcher.rank_main import run
    from megatron.trainer.run import train


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
