#!/usr/bin/env python
"""Train on the ranks that `python deepy.py train.py a.yml b.yml` (or torchrun, or srun) starts."""

from megatron.launcher.rank_main import run
from megatron.trainer.run import train

if __name__ == "__main__":
    run(train)
