"""The training loss: cross-entropy summed over learned tokens, divided by their number in the *global* batch.

Whatever the micro-batch, the accumulation or the data-parallel split, every learned token weighs the same: a mean of
means would weigh the tokens of half-masked micro-batches more, and 0/0 of a fully masked one is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.common.labels import IGNORE_INDEX
from megatron.ops import vocab_parallel_cross_entropy


@dataclass(frozen=True)
class GlobalMeanLoss:
    """Loss of one micro-batch such that the engine's mean over micro-batches and ranks is the global mean.

    `targets` are (labels [b, s] with -100 where nothing is learned, weight []): the engine averages over the N
    micro-batches of the global batch, so weight = N / learned tokens of the global batch (`step_weight`).
    """

    group: ProcessGroup
    vocab_size: int

    def __call__(self, logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        labels, weight = targets
        # Nobody reads logits behind their loss: the gradient takes their memory.
        return self.token_losses(logits, labels, overwrite_logits=True).sum() * weight

    def token_losses(self, logits: Tensor, labels: Tensor, overwrite_logits: bool = False) -> Tensor:
        """fp32 loss per token [b, s], 0 where the label is -100; `logits` [b, s, V / tp] of this rank."""
        return vocab_parallel_cross_entropy(
            logits,
            labels,
            self.group,
            vocab_start=self.group.rank() * logits.shape[-1],
            true_vocab_size=self.vocab_size,
            ignore_index=IGNORE_INDEX,
            overwrite_logits=overwrite_logits,
        )


def step_weight(learned_tokens: int, micro_batches: int) -> Tensor:
    """The factor that turns sums over micro-batches into the mean over the global batch's learned tokens.

    `micro_batches` counts all of the global batch's: accumulation x data parallel. fp32 [].
    """
    return torch.tensor(micro_batches / learned_tokens, dtype=torch.float32)
