"""Chooses the next token: greedy, or sampled with temperature, top-k, top-p, min-p and a repetition penalty.

They are applied in the order of `transformers`: penalty, temperature, top-k, top-p, min-p. A token is drawn by
inverting the cumulative distribution, in the order of the vocabulary, at one random number. Rounding differences
between layouts or batches thus change a token only if the number falls within rounding error of a boundary. The number
depends only on seed, prompt, sample and position.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

NOT_FINITE = -1  # in place of a token whose logits are NaN or all -inf


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; the defaults of the other fields have no effect."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1


class RandomNumbers:
    """A random number in [0, 1) for each new token of one sample of a prompt.

    Philox 4x64 (Salmon et al. 2011), keyed by a hash of seed, prompt and sample; the number at a position is the top 53
    bits of the output word with that index. Only one block is kept in memory, whatever the length of the text.
    """

    BLOCK = 256  # numbers; a multiple of the four that one step of the counter gives

    def __init__(self, seed: int, prompt: int, sample: int) -> None:
        digest = hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()
        self._key = int.from_bytes(digest[:16], "little")
        self._block, self._numbers = -1, np.zeros(0)

    def at(self, position: int) -> float:
        """The random number of new token `position`, counted from 0."""
        block, place = divmod(position, self.BLOCK)
        if block != self._block:
            philox = np.random.Philox(key=self._key, counter=block * self.BLOCK // 4)
            bits: NDArray[np.uint64] = philox.random_raw(self.BLOCK)
            self._block, self._numbers = block, (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return float(self._numbers[place])


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [n, V], those of tokens in `seen` [n, V] divided by the penalty, or multiplied by it if negative
    (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sampling probabilities [n, V] in fp64; 0 for tokens that top-k, top-p or min-p exclude."""
    scores = logits.double() / sampling.temperature
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if 0 < sampling.top_p < 1:
        probabilities, order = scores.softmax(-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        outside = before >= sampling.top_p
        outside[:, 0] = False  # the most likely token always stays
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.min_p:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Tokens [n]: invert the cumulative distribution of `probabilities` [n, V] at `numbers` [n] in [0, 1)."""
    cumulative = probabilities.cumsum(-1)
    target = numbers[:, None].to(cumulative) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # The target may round up to the total, beyond every token: then take the last token with a probability above 0.
    last = (probabilities > 0).int().cumsum(-1).argmax(-1)
    return torch.minimum(token, last)


def choose(
    local: Tensor,
    sampling: Sampling,
    vocab_size: int,
    group: dist.ProcessGroup,
    numbers: NDArray[np.float64],
    seen: Tensor | None = None,
) -> Tensor:
    """Next tokens [n], the same on all tensor-parallel ranks, from this rank's logits [n, V / tp]. Collective.

    `numbers` [n] come from `RandomNumbers`; `seen` [n, vocab_size] marks the tokens that the penalty applies to. The
    token is NOT_FINITE where the logits are not finite.
    """
    if sampling.greedy and seen is None:
        return _most_likely(local, vocab_size, group)
    logits = _whole(local, group)[:, :vocab_size].float()
    if seen is not None:
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        token = logits.argmax(-1)
    else:
        token = draw(distribution(logits, sampling), torch.from_numpy(numbers).to(logits.device))
    return token.masked_fill(~logits.amax(-1).isfinite(), NOT_FINITE)


def _most_likely(local: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """The first token [n] with the largest logit, from one pair (logit, token) per rank."""
    start = group.rank() * local.shape[-1]
    local = local.float()
    if start + local.shape[-1] > vocab_size:  # padding of the vocabulary
        local = local.clone()
        local[:, max(0, vocab_size - start) :] = -torch.inf
    value, token = local.max(-1)
    if group.size() > 1:
        pair = torch.stack((value.double(), (token + start).double()), -1)
        pairs = [torch.empty_like(pair) for _ in range(group.size())]
        dist.all_gather(pairs, pair, group=group)
        values, tokens = torch.stack(pairs).unbind(-1)  # [tp, n]
        value, rank = values.max(0)  # NaN is largest; among equals the first rank, with the lowest tokens
        token = tokens.gather(0, rank[None])[0].long()
    return token.masked_fill(~value.isfinite(), NOT_FINITE)


def _whole(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Logits [n, V] from every rank's [n, V / tp]."""
    if group.size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, -1)
