"""Validation loss and perplexity of a checkpoint: python deepy.py eval.py model.yml run.yml --load DIR"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

from megatron.evaluation.checkpoint import evaluate_checkpoint  # noqa: E402
from megatron.launcher.rank_main import run  # noqa: E402


def main() -> None:
    run(evaluate_checkpoint, task="eval")


if __name__ == "__main__":
    main()
