"""Text from a checkpoint: python deepy.py generate.py model.yml run.yml --load DIR -i prompts.txt -o out.jsonl"""

import signal

from megatron.common.imports import slow_imports

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

with slow_imports():
    from megatron.generation.prompts import generate_text
    from megatron.launcher.rank_main import run


def main() -> None:
    run(generate_text, task="generate")


if __name__ == "__main__":
    main()
