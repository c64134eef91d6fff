"""The core of attention: softmax(q k^T / sqrt(d)) v over the tokens a token may see. No mask is ever materialized.

Isolated documents have two implementations: `torch.nn.attention.varlen` takes all documents in one call, on GPUs in
bf16 and fp16; everywhere else each document is a separate call on its slice. `document_attention_on` chooses.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model.documents import Documents

Attend = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]
"""q [s, b, n, d], k and v [s, b, m, d] with m dividing n -> [s, b, n, d]."""

VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # a few roundings, relative to the largest value


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: each position attends to itself and to earlier positions.

    q [s, b, n, d], k and v [s, b, m, d] with m dividing n; returns [s, b, n, d].
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return context.permute(2, 0, 1, 3)


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """`causal_attention` within each document, by the implementation chosen for this device and dtype."""
    return document_attention_on(q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3]).attend(q, k, v, documents)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """`causal_attention` called once per document: memory stays linear in s."""
    rows = []
    for row, edges in enumerate(documents.edges):
        rows.append(
            torch.cat(
                [
                    causal_attention(*(x[start:stop, row : row + 1] for x in (q, k, v)))
                    for start, stop in itertools.pairwise(edges)
                ]
            )
        )
    return torch.cat(rows, dim=1)


class Varlen:
    """All documents in one call of a function like `torch.nn.attention.varlen.varlen_attn`.

    torch 2.10 takes `is_causal` and needs as many key heads as query heads; later versions take `window_size`, and
    fewer key heads where they have `enable_gqa`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        known = inspect.signature(function).parameters
        self._function = function
        self._causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        self._groups = "enable_gqa" in known

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        s, b, heads, _ = q.shape
        groups = heads // k.shape[2]
        keywords = self._causal
        if groups > 1 and self._groups:
            keywords = keywords | {"enable_gqa": True}
        elif groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))  # samples concatenated
        offsets, longest = documents.offsets, documents.longest
        context: Tensor = self._function(q, k, v, offsets, offsets, longest, longest, **keywords)
        return context.unflatten(0, (b, s)).transpose(0, 1)


@dataclass(frozen=True)
class DocumentAttention:
    """An implementation of attention within isolated documents; `how` describes it in the log."""

    attend: Attend
    how: str


@functools.cache
def document_attention_on(kind: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> DocumentAttention:
    """Choose the implementation for a device type, a dtype and this rank's heads.

    Where torch and the device support varlen attention, it is first tried forward and backward on a few documents of
    random numbers: some builds of torch return NaN.
    """
    why_not = None
    if kind != "cuda":
        why_not = "varlen attention needs a GPU"
    elif dtype not in VARLEN_DTYPES:
        why_not = f"varlen attention computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    elif (function := _varlen_function()) is None:
        why_not = f"torch {torch.__version__} has no torch.nn.attention.varlen"
    else:
        varlen = Varlen(function)
        why_not = _failure(varlen, torch.device(kind), dtype, heads, kv_heads, head_dim)
    if why_not is None:
        return DocumentAttention(varlen, "all in one call of torch.nn.attention.varlen")
    return DocumentAttention(one_by_one, f"a call of attention for each ({why_not})")


def _varlen_function() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Callable[..., Any] = varlen_attn
    return found


def _failure(
    varlen: Attend, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> str | None:
    """How `varlen` fails or differs from `one_by_one` on this device, as one sentence; None if they agree."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in (1, 70, 185, 130, 126)]).view(2, 256)
    documents = Documents.at(positions.to(device))

    def normal(n: int) -> Tensor:
        return torch.randn(256, 2, n, head_dim, generator=generator).to(device, dtype)

    given = (normal(heads), normal(kv_heads), normal(kv_heads))
    output_gradient = normal(heads)

    def results(attend: Attend) -> list[Tensor]:
        q, k, v = (tensor.clone().requires_grad_() for tensor in given)
        with torch.enable_grad():
            output = attend(q, k, v, documents)
        return [output.detach(), *torch.autograd.grad(output, (q, k, v), output_gradient)]

    with torch.inference_mode(False):
        try:
            found = results(varlen)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return f"varlen attention failed: {str(error).partition(chr(10))[0]}"
        names = ("output", "gradient of q", "gradient of k", "gradient of v")
        for name, ours, theirs in zip(names, found, results(one_by_one), strict=True):
            off = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            if not off <= _TOLERANCE[dtype]:  # written so that NaN fails too
                return f"the {name} of varlen attention is off by {off:.1e} of the largest value"
    return None
