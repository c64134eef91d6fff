#!/usr/bin/env python
"""A multiple-choice test of a checkpoint: python deepy.py mcq.py model.yml run.yml --load DIR --mcq.items FILE"""

from megatron.launcher.programs.mcq import main

if __name__ == "__main__":
    main()
