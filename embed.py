#!/usr/bin/env python
"""Vectors of texts from a checkpoint: python deepy.py embed.py model.yml run.yml --load DIR --embed.input FILE"""

from megatron.launcher.programs.embed import main

if __name__ == "__main__":
    main()
