"""Replacements for `torch.nn.attention.varlen.varlen_attn` with its signatures over time, in float64, on any device."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


class Recorded:
    """Keeps the arguments of each call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []


def attended(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """Attention within sequences: query, key, value [T, n, d]; sequence i is `offsets[i]` to `offsets[i + 1]`."""
    parts = []
    for start, stop in itertools.pairwise(offsets.tolist()):
        q, k, v = (x[start:stop].double() for x in (query, key, value))
        scores = torch.einsum("qnd,knd->nqk", q, k) / query.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        parts.append(torch.einsum("nqk,knd->qnd", scores.softmax(-1), v))
    return torch.cat(parts).to(query.dtype)


class Newer(Recorded):
    """As in torch 2.13: causal through `window_size`; fewer key heads if `enable_gqa`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        self.calls.append(dict(locals()))
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        return attended(query, key, value, cu_seq_q, window_size == (-1, 0))


class Older(Recorded):
    """As in torch 2.10: causal through `is_causal`; as many key heads as query heads."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        return_aux: Any = None,
    ) -> Tensor:
        self.calls.append(dict(locals()))
        return attended(query, key, value, cu_seq_q, is_causal)
