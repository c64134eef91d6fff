"""Text from a checkpoint: python deepy.py generate.py model.yml run.yml --load DIR -i prompts.txt -o out.jsonl"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # Slurm's warning stays pending until it is handled

from megatron.generation.prompts import generate_text  # noqa: E402
from megatron.launcher.rank_main import run  # noqa: E402


def main() -> None:
    run(generate_text, task="generate")


if __name__ == "__main__":
    main()
