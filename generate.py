#!/usr/bin/env python
"""Text from a checkpoint: python deepy.py generate.py model.yml run.yml --load DIR -i prompts.txt -o out.jsonl"""

from megatron.launcher.programs.generate import main

if __name__ == "__main__":
    main()
