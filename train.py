#!/usr/bin/env python
"""Train on the ranks that `python deepy.py train.py a.yml b.yml` (or torchrun, or srun) starts."""

from megatron.launcher.programs.train import main

if __name__ == "__main__":
    main()
