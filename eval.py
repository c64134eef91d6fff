#!/usr/bin/env python
"""Validation loss and perplexity of a checkpoint: python deepy.py eval.py model.yml run.yml --load DIR"""

from megatron.evaluation.checkpoint import evaluate_checkpoint
from megatron.launcher.rank_main import run

if __name__ == "__main__":
    run(evaluate_checkpoint, task="eval")
