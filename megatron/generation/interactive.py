"""Prompts that are typed, one a line, and their continuations on the screen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from megatron.parallel.collective_errors import RankGroup
from megatron.parallel.place import Place
from megatron.parallel.rank_env import TYPED

STOP = "stop"  # GPT-NeoX's word


def typed_prompts(ranks: RankGroup) -> Iterator[str]:
    """Lines that rank 0 reads, the same on all ranks, until the input ends or a line says `stop`. Collective.

    Empty lines are asked for again. The other ranks wait as long as a collective may take.
    """
    source = None
    if ranks.rank == 0:
        source = open(int(os.environ.get(TYPED, "0")), encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    while True:
        prompt = ranks.broadcast(_next_line(source) if source is not None else None)
        if prompt is None:
            return
        yield prompt


def show(place: Place, text: str) -> None:
    """Print on rank 0, at once."""
    if place.rank == 0:
        print(text, flush=True)


def _next_line(source: Iterator[str]) -> str | None:
    while True:
        print(f"prompt ({STOP} ends): ", end="", file=sys.stderr, flush=True)
        line = next(source, None)
        if line is None or line.strip().lower() == STOP:
            return None
        if line.strip():
            return line.rstrip("\n")
