"""Row blocks for the PyTorch references.

A chain of element-wise passes over a tensor larger than the cache costs one trip to memory per pass. On the CPU the
references therefore apply their formula to one block of rows at a time; on any other device, and while a graph is
being traced, the tensor is one block. With gradients written by hand this is what a CPU step gains on `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.common.cpu_cache import BLOCK_ELEMENTS


def by_blocks(
    formula: Callable[..., tuple[Tensor, ...]], *rows: Tensor, sums: int = 0, into: Tensor | None = None
) -> tuple[Tensor, ...]:
    """formula(*rows) of tensors [n, ...], the first of them a matrix, a block of rows at a time.

    The last `sums` results are sums over rows, the others have n rows. `into` takes the first result; it may be one of
    `rows`.
    """
    n = rows[0].shape[0]
    size = max(1, n)
    if rows[0].device.type == "cpu" and not torch.compiler.is_compiling():
        size = max(1, BLOCK_ELEMENTS // max(1, rows[0].shape[1]))
    if n <= size and into is None:
        return formula(*rows)
    whole = [] if into is None else [into]
    totals: tuple[Tensor, ...] = ()
    for start in range(0, max(1, n), size):
        parts = formula(*(t[start : start + size] for t in rows))
        of_rows, summed = parts[: len(parts) - sums], parts[len(parts) - sums :]
        if not whole:
            whole = [part.new_empty(n, *part.shape[1:]) for part in of_rows]
        for result, part in zip(whole, of_rows, strict=True):
            result[start : start + size] = part
        totals = tuple(t + part for t, part in zip(totals, summed, strict=True)) if totals else summed
    return (*whole, *totals)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of all arithmetic on `x`: fp64 for fp64 (gradcheck), fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
