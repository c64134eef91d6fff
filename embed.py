#!/usr/bin/env python
"""Vectors of texts from a checkpoint: python deepy.py embed.py model.yml run.yml --load DIR --embed.input FILE"""

from megatron.evaluation.embeddings.run import embed_texts
from megatron.launcher.rank_main import run

if __name__ == "__main__":
    run(embed_texts, task="embed")
