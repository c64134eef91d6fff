"""Imports that take seconds: torch, DeepSpeed, megatron-core."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def slow_imports() -> Iterator[None]:
    """Collect no garbage while libraries are imported in this block, and never visit their objects later.

    Collections that visit the growing heap again and again take a third of the time of the imports. Later, a full
    collection would visit 440,000 objects in 0.4 s, at a moment of its own on each rank; in a forked rank it would also
    copy the memory that they are in.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
