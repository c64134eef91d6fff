"""Row blocks for the PyTorch references.

A chain of element-wise passes over a tensor larger than the cache costs one trip to memory per pass. On the CPU the
references therefore run the whole chain on one block of rows at a time; on any other device, and while a graph is
being traced, the tensor is one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.common.cpu_cache import BLOCK_ELEMENTS


def rows_per_block(x: Tensor) -> int:
    """How many rows of the matrix `x` [rows, width] the references process at once."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, x.shape[0])
    return max(1, BLOCK_ELEMENTS // max(1, x.shape[1]))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of all arithmetic on `x`: fp64 for fp64 (gradcheck), fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
