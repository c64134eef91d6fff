#!/usr/bin/env python
"""Start a program of this project on all its ranks: python deepy.py train.py model.yml run.yml [--key value ...]"""

import sys

from megatron.launcher.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
