"""Cross-entropy of logits whose vocabulary is split over tensor-parallel ranks.

One pass over the local columns gives each row's maximum, sum of exponentials and target logit. The ranks exchange
these three numbers in one all-gather; the gradient needs no communication. All arithmetic is fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.ops.cpu_blocks import compute_dtype, rows_per_block
from megatron.ops.library import use_kernels


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    true_vocab_size: int,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
) -> Tensor:
    """Loss of every token, fp32 (fp64 for fp64 logits), shaped like `labels`; 0 where the label is `ignore_index`.

    `logits` [..., local vocabulary] are this rank's columns, starting at column `vocab_start` of the whole vocabulary;
    columns from `true_vocab_size` on are padding: excluded from the sum, with gradient zero. `labels` [...] are
    whole-vocabulary indices. `group` holds the ranks over which the vocabulary is split, None for one rank. A label
    that is neither a true column nor `ignore_index` makes the token's loss infinite. `overwrite_logits` lets the
    backward pass write the gradient over the logits, which saves as much memory as they take; they must then be dense
    and used nowhere else, and the graph allows one backward pass (eager mode only). Raises ValueError if the shapes do
    not match.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"cross entropy: logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, "
            f"not {tuple(labels.shape)}"
        )
    if overwrite_logits and not logits.is_contiguous():
        raise ValueError(f"cross entropy: logits with strides {logits.stride()} must be contiguous to be overwritten")
    rows, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    width = min(max(true_vocab_size - vocab_start, 0), rows.shape[1])
    numbers = vocab_start, width, ignore_index, overwrite_logits
    if use_kernels("vocab_parallel_cross_entropy", logits):
        stats = torch.ops.neox.cross_entropy_stats.default(rows.detach(), flat, vocab_start, width)
        loss = torch.ops.neox.cross_entropy.default(rows, gather_stats(stats, group), flat, *numbers)[0]
    else:
        stats = reference_stats(rows.detach(), flat - vocab_start, width)
        loss = _CrossEntropy.apply(rows, gather_stats(stats, group), flat, *numbers)
    return loss.view(labels.shape)


def reference_stats(logits: Tensor, target: Tensor, width: int) -> Tensor:
    """[3, rows]: maximum, sum of exp(logit - maximum) and target logit over the first `width` columns of `logits`.

    `target` [rows] is the local column of the target, or any number outside [0, width) if another rank has it: the
    target logit is then -inf. A rank without true columns returns (-inf, 0, -inf).
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
        # softmax makes one fused pass, and its largest element is 1 / sum: this saves a separate pass over exp.
        ss[1] = torch.softmax(xf, -1).amax(-1).reciprocal_()
        here = (ts >= 0) & (ts < width)
        ss[2] = xf.gather(1, ts.clamp(0, width - 1)[:, None])[:, 0].masked_fill_(~here, -torch.inf)
    return stats


def combine_stats(stats: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(loss [rows], log-sum-exp [rows]) from the statistics [ranks, 3, rows] of all ranks."""
    local_max, local_sum, target = stats.unbind(1)
    lse = torch.logsumexp(local_max + local_sum.log(), 0)
    return (lse - target.amax(0)).masked_fill_(labels == ignore_index, 0), lse


def gather_stats(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-gather the statistics, [3, rows] -> [ranks, 3, rows]: the only collective of the loss."""
    if group is None or group.size() == 1:
        return stats[None]
    everyone = stats.new_empty(group.size(), *stats.shape)
    dist.all_gather_into_tensor(everyone.flatten(0, 1), stats, group=group)
    return everyone


def reference_gradient(logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor, width: int, grad: Tensor) -> Tensor:
    """Write dloss (softmax - onehot), rounded once, to `grad` [rows, local vocabulary]; 0 from column `width` on.

    `grad` has the dtype of `logits` and may be `logits` itself, which halves the time on the CPU: no tensor of that
    size is allocated.
    """
    dtype = compute_dtype(logits)
    grad[:, width:] = 0
    if width == 0:
        return grad
    block = rows_per_block(logits)
    for xs, ts, ls, gs, out in zip(
        logits.split(block), target.split(block), lse.split(block), dloss.split(block), grad.split(block), strict=True
    ):
        xf, part = xs[:, :width].to(dtype), out[:, :width]
        direct = out.dtype == dtype and not torch.compiler.is_compiling()  # Dynamo refuses strided `out=`
        p = torch.sub(xf, ls[:, None], out=part) if direct else xf - ls[:, None]
        p.exp_()
        here = (ts >= 0) & (ts < width)
        p.scatter_add_(1, ts.clamp(0, width - 1)[:, None], -here.to(dtype)[:, None])
        p.mul_(gs[:, None])
        if not direct:
            part.copy_(p)
    return grad


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        stats: Tensor,
        labels: Tensor,
        vocab_start: int,
        width: int,
        ignore_index: int,
        overwrite_logits: bool,
    ) -> Tensor:
        loss, lse = combine_stats(stats, labels, ignore_index)
        ctx.save_for_backward(logits, labels, lse)
        ctx.numbers = vocab_start, width, ignore_index, overwrite_logits
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        vocab_start, width, ignore_index, overwrite_logits = ctx.numbers
        logits = logits.detach()
        if overwrite_logits:
            # Autograd checks the version of saved tensors: another node that saved these logits, or a second backward
            # through this one, fails with torch's own message instead of reading gradients as logits.
            torch.autograd.graph.increment_version(logits)
        out = logits if overwrite_logits else torch.empty_like(logits, memory_format=torch.contiguous_format)
        scale = dloss.masked_fill(labels == ignore_index, 0)
        grad = reference_gradient(logits, labels - vocab_start, lse, scale, width, out)
        return grad, None, None, None, None, None, None


# The compiled operators (csrc/rocm_kernels/cross_entropy.cu): schema and shapes for tracing. The collective comes
# between the statistics, which autograd treats as constants, and the loss, whose gradient is in autograd.cpp.

_NUMBERS = "int vocab_start, int width, int ignore_index"
_GRADIENT = f"Tensor labels, Tensor lse, Tensor dloss, {_NUMBERS}"
torch.library.define(
    "neox::cross_entropy_stats", "(Tensor logits, Tensor labels, int vocab_start, int width) -> Tensor"
)
torch.library.define(
    "neox::cross_entropy",
    f"(Tensor logits, Tensor stats, Tensor labels, {_NUMBERS}, bool overwrite_logits) -> (Tensor, Tensor)",
)
torch.library.define("neox::cross_entropy_gradient", f"(Tensor logits, {_GRADIENT}) -> Tensor")
torch.library.define("neox::cross_entropy_gradient_", f"(Tensor(a!) logits, {_GRADIENT}) -> ()")


@torch.library.register_fake("neox::cross_entropy_stats")
def _(logits: Tensor, labels: Tensor, vocab_start: int, width: int) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=torch.float32)


@torch.library.register_fake("neox::cross_entropy")
def _(logits: Tensor, stats: Tensor, labels: Tensor, *_: int) -> tuple[Tensor, Tensor]:
    return stats.new_empty(stats.shape[2]), stats.new_empty(stats.shape[2])


@torch.library.register_fake("neox::cross_entropy_gradient")
def _(logits: Tensor, labels: Tensor, lse: Tensor, dloss: Tensor, *_: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("neox::cross_entropy_gradient_")
def _(logits: Tensor, labels: Tensor, lse: Tensor, dloss: Tensor, *_: int) -> None:
    return None
