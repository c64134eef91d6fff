"""A multiple-choice test of a checkpoint: python deepy.py mcq.py model.yml run.yml --load DIR --mcq.items FILE"""

import signal

from megatron.common.imports import slow_imports

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

with slow_imports():
    from megatron.evaluation.multiple_choice.run import answer_questions
    from megatron.launcher.rank_main import run


def main() -> None:
    run(answer_questions, task="mcq")


if __name__ == "__main__":
    main()
