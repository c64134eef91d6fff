#!/usr/bin/env python
"""Start a program of this project on all its ranks: python deepy.py train.py model.yml run.yml [--key value ...]"""

from megatron.launcher.deepy import main

if __name__ == "__main__":
    main()
