"""Gloo ranks for a benchmark, forked from a process that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any


def run_ranks_forked(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Results of `function(rank, world_size, *args)` by rank, each in a process of a gloo world.

    The caller must not have a process group of its own. Raises SystemExit if a rank fails; its message is printed.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, args, folder, results), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        found: dict[int, Any] = {}
        while len(found) < len(ranks):
            if any(process.exitcode not in (None, 0) for process in ranks):
                raise SystemExit(f"a rank of {function.__qualname__} failed; its message is above")
            if not results.empty():
                rank, result = results.get()
                found[rank] = result
            time.sleep(0.02)
        for process in ranks:
            process.join()
    return [found[rank] for rank in range(world_size)]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], folder: str, results: Any
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.manual_seed(0)  # the same batch everywhere: tensor-parallel ranks must agree on it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results.put((rank, function(rank, world_size, *args)))
    dist.destroy_process_group()
