"""Cross-entropy of logits whose vocabulary is split over tensor-parallel ranks.

One pass over the local columns gives each row's maximum, sum of exponentials and target logit. The ranks exchange
these three numbers in one all-gather; the gradient pass needs no communication. All arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.ops.rows import compute_dtype, rows_per_block


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    true_vocab_size: int,
    ignore_index: int = -100,
) -> Tensor:
    """Loss of every token, fp32 (fp64 for fp64 logits), shaped like `labels`; 0 where the label is `ignore_index`.

    `logits` [..., local vocabulary] are this rank's columns, the first of them column `vocab_start` of the whole
    vocabulary; columns from `true_vocab_size` on are padding, excluded from the sum whatever they hold, with gradient
    zero. `labels` [...] are whole-vocabulary indices. `group` holds the ranks among which the vocabulary is split,
    None for one rank. A label that is neither a true column nor `ignore_index` makes the token's loss infinite.
    Raises ValueError if the shapes do not fit.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"cross entropy: logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, "
            f"not {tuple(labels.shape)}"
        )
    return _CrossEntropy.apply(logits, labels, group, vocab_start, true_vocab_size, ignore_index)


def reference_stats(logits: Tensor, target: Tensor, width: int) -> Tensor:
    """[3, rows]: maximum, sum of exp(logit - maximum) and target logit over the first `width` columns of `logits`.

    `target` [rows] is the local column, or anything outside [0, width) for a row whose target is elsewhere, which
    gets -inf. A rank without true columns gives (-inf, 0, -inf).
    """
    dtype = compute_dtype(logits)
    stats = logits.new_empty(3, logits.shape[0], dtype=dtype)
    stats[0].fill_(-torch.inf)
    stats[1].zero_()
    stats[2].fill_(-torch.inf)
    if width == 0:
        return stats
    block = rows_per_block(logits)
    for xs, ts, ss in zip(logits.split(block), target.split(block), stats.split(block, dim=1), strict=True):
        xf = xs[:, :width].to(dtype)
        torch.amax(xf, -1, out=ss[0])
        # softmax makes one fused pass, and its largest element is 1 / sum: no second pass of our own over exp.
        ss[1] = torch.softmax(xf, -1).amax(-1).reciprocal_()
        here = (ts >= 0) & (ts < width)
        ss[2] = xf.gather(1, ts.clamp(0, width - 1)[:, None])[:, 0].masked_fill_(~here, -torch.inf)
    return stats


def combine_stats(stats: Tensor) -> tuple[Tensor, Tensor]:
    """(log-sum-exp [rows], target logit [rows]) from every rank's statistics [ranks, 3, rows]."""
    local_max, local_sum, target = stats.unbind(1)
    lse = torch.logsumexp(local_max + local_sum.log(), 0)
    return lse, target.amax(0)


def gather_stats(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, 3, rows] from this rank's [3, rows]: the one collective of the loss."""
    if group is None or group.size() == 1:
        return stats[None]
    everyone = stats.new_empty(group.size(), *stats.shape)
    dist.all_gather_into_tensor(everyone.flatten(0, 1), stats, group=group)
    return everyone


def reference_gradient(logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor, width: int) -> Tensor:
    """dloss (softmax - onehot) [rows, local vocabulary] in the dtype of `logits`, rounded once, 0 beyond `width`."""
    dtype = compute_dtype(logits)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad[:, width:] = 0
    if width == 0:
        return grad
    block = rows_per_block(logits)
    for xs, ts, ls, gs, out in zip(
        logits.split(block), target.split(block), lse.split(block), dloss.split(block), grad.split(block), strict=True
    ):
        xf, part = xs[:, :width].to(dtype), out[:, :width]
        p = torch.sub(xf, ls[:, None], out=part) if out.dtype == dtype else xf - ls[:, None]
        p.exp_()
        here = (ts >= 0) & (ts < width)
        p.scatter_add_(1, ts.clamp(0, width - 1)[:, None], -here.to(dtype)[:, None])
        p.mul_(gs[:, None])
        if out.dtype != dtype:
            part.copy_(p)
    return grad


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        true_vocab_size: int,
        ignore_index: int,
    ) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        flat = labels.reshape(-1)
        width = min(max(true_vocab_size - vocab_start, 0), rows.shape[1])
        ignored = flat == ignore_index
        target = flat - vocab_start
        lse, target_logit = combine_stats(gather_stats(reference_stats(rows, target, width), group))
        ctx.save_for_backward(rows, target, lse, ignored)
        ctx.width, ctx.shape = width, logits.shape
        return (lse - target_logit).masked_fill_(ignored, 0).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        rows, target, lse, ignored = ctx.saved_tensors
        scale = dloss.reshape(-1).masked_fill(ignored, 0)
        grad = reference_gradient(rows, target, lse, scale, ctx.width)
        return grad.view(ctx.shape), None, None, None, None, None
