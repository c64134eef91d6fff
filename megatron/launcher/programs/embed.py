"""Vectors of texts from a checkpoint: python deepy.py embed.py model.yml run.yml --load DIR --embed.input FILE"""

import signal

from megatron.common.imports import slow_imports

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

with slow_imports():
    from megatron.evaluation.embeddings.run import embed_texts
    from megatron.launcher.rank_main import run


def main() -> None:
    run(embed_texts, task="embed")


if __name__ == "__main__":
    main()
