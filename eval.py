#!/usr/bin/env python
"""Validation loss and perplexity of a checkpoint: python deepy.py eval.py model.yml run.yml --load DIR"""

from megatron.launcher.programs.eval import main

if __name__ == "__main__":
    main()
