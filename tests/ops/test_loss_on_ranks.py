"""Vocab-parallel cross-entropy on gloo ranks equals one rank with the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.ops import vocab_parallel_cross_entropy
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _parallel_loss(rank: int, world_size: int, full: Tensor, labels: Tensor, true: int) -> tuple[Tensor, Tensor]:
    columns = full.shape[1] // world_size
    local = full[:, rank * columns : (rank + 1) * columns].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(local, labels, dist.group.WORLD, rank * columns, true)
    (loss * torch.arange(1, 13)).sum().backward()
    return loss.detach(), local.grad


@pytest.mark.parametrize("true", [40, 37, 29, 25])  # padding: none, within the last rank, all of it, and beyond
def test_ranks_agree_with_one_rank(true: int) -> None:
    torch.manual_seed(0)
    full = torch.randn(12, 40, dtype=torch.float64)
    labels = torch.randint(0, true, (12,))
    labels[5] = -100
    single = full.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(single, labels, None, 0, true)
    (loss * torch.arange(1, 13)).sum().backward()
    results = run_ranks(_parallel_loss, 4, full, labels, true)
    for rank_loss, _ in results:
        assert (rank_loss - loss).abs().max() < 1e-12
        assert torch.equal(rank_loss, results[0][0])
    assert (torch.cat([grad for _, grad in results], 1) - single.grad).abs().max() < 1e-12
