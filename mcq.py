#!/usr/bin/env python
"""A multiple-choice test of a checkpoint: python deepy.py mcq.py model.yml run.yml --load DIR --mcq.items FILE"""

from megatron.evaluation.multiple_choice.run import answer_questions
from megatron.launcher.rank_main import run

if __name__ == "__main__":
    run(answer_questions, task="mcq")
