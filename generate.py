#!/usr/bin/env python
"""Text from a checkpoint: python deepy.py generate.py model.yml run.yml --load DIR -i prompts.txt -o out.jsonl"""

from megatron.generation.prompts import generate_text
from megatron.launcher.rank_main import run

if __name__ == "__main__":
    run(generate_text, task="generate")
