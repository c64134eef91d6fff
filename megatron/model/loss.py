"""The training loss: cross-entropy summed over learned tokens, divided by their number in the *global* batch.

Every learned token has the same weight, whatever the micro-batch size, accumulation or data-parallel split. A mean of
means would overweight the tokens of half-masked micro-batches, and be 0/0 = NaN for a fully masked one.
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
    """Loss of one micro-batch, scaled so that the engine's mean over micro-batches and ranks is the global mean.

    `targets` are (labels [b, s] with -100 where nothing is learned, weight []): the engine averages over the N
    micro-batches of the global batch, so weight = N / learned tokens of the global batch (`step_weight`).
    """

    group: ProcessGroup
    vocab_size: int

    def __call__(self, logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        labels, weight = targets
        # Nothing reads the logits after the loss: the gradient reuses their memory.
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
    """fp32 scalar: turns loss sums, averaged over micro-batches, into the mean over the global batch's learned tokens.

    `micro_batches` counts those of the whole global batch: accumulation x data-parallel size.
    """
    return torch.tensor(micro_batches / learned_tokens, dtype=torch.float32)
