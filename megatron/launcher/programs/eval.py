"""Validation loss and perplexity of a checkpoint: python deepy.py eval.py model.yml run.yml --load DIR"""

import signal

from megatron.common.imports import slow_imports

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

with slow_imports():
    from megatron.evaluation.checkpoint import evaluate_checkpoint
    from megatron.launcher.rank_main import run


def main() -> None:
    run(evaluate_checkpoint, task="eval")


if __name__ == "__main__":
    main()
