"""Log-probabilities of chosen tokens at chosen positions, without a softmax over the whole sequence.

Multiple choice needs four letters at one position, a continuation a few tokens at the end: only those rows of the
logits are read, [b, k, V / tp] instead of [b, s, V / tp], and the vocabulary is never gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.common.labels import IGNORE_INDEX
from megatron.model.loss import GlobalMeanLoss


@dataclass(frozen=True)
class TokenScores:
    """Scores tokens on the last stage; takes the place of the engine's loss function when nothing is trained."""

    group: ProcessGroup
    vocab_size: int

    def __call__(self, logits: Tensor, queries: tuple[Tensor, Tensor]) -> Tensor:
        """[2, b, k] fp32: log-probability in nats, and 1 where the token is the most likely one.

        `logits` [b, s, V / tp] of this rank; `queries` are (positions [b, k], tokens [b, k]). Both results are 0 where
        the token is IGNORE_INDEX.
        """
        positions, tokens = queries
        rows = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        scores = -GlobalMeanLoss(self.group, self.vocab_size).token_losses(rows, tokens)
        return torch.stack([scores, self._most_likely(rows).eq(tokens).float()])

    def _most_likely(self, rows: Tensor) -> Tensor:
        """Whole-vocabulary index [b, k] of the largest logit; the lowest index where several are largest."""
        start = self.group.rank() * rows.shape[-1]
        width = min(max(self.vocab_size - start, 0), rows.shape[-1])  # vocabulary padding is never an answer
        if width:
            value, index = rows[..., :width].float().max(-1)
            index = index + start
        else:
            value = rows.new_full(rows.shape[:-1], -torch.inf, dtype=torch.float32)
            index = torch.full(value.shape, IGNORE_INDEX - 1, device=rows.device)
        if self.group.size() == 1:
            return index
        values = [torch.empty_like(value) for _ in range(self.group.size())]
        indices = [torch.empty_like(index) for _ in range(self.group.size())]
        dist.all_gather(values, value.contiguous(), group=self.group)
        dist.all_gather(indices, index.contiguous(), group=self.group)
        winner = torch.stack(values).argmax(0, keepdim=True)
        return torch.stack(indices).gather(0, winner)[0]
