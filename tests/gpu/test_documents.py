"""On a real GPU: isolated documents in one call or in one call each give the same results, without host syncs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron.model.attention import Varlen, document_attention_on, one_by_one
from megatron.model.documents import Documents
from tests.support.requirements import need

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM, S, B = 8, 2, 128, 1024, 2


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    need("gpu", torch.cuda.is_available(), "torch sees no GPU")


def documents() -> Documents:
    """Many short documents and a long one, different in each sample."""
    lengths = (1, 2, 63, 64, 65, 129, 700, 500, 500, 24)
    return Documents.at(torch.cat([torch.arange(length) for length in lengths]).view(B, S).cuda())


def given(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(S, B, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def exact(dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients in fp64, from the same rounded inputs, with a mask of the whole sequence."""
    q, k, v, weights = (tensor.double().permute(1, 2, 0, 3).requires_grad_() for tensor in given(dtype))
    number = torch.zeros(B, S, dtype=torch.int64)
    for row, edges in enumerate(documents().edges):
        for index, (start, stop) in enumerate(itertools.pairwise(edges)):
            number[row, start:stop] = index
    seen = (number[:, :, None] == number[:, None, :]).tril().cuda()
    repeated = [x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v)]
    scores = (q @ repeated[0].transpose(-1, -2) / DIM**0.5).masked_fill(~seen[:, None], -torch.inf)
    output = scores.softmax(-1) @ repeated[1]
    gradients = torch.autograd.grad(output, (q, k, v), weights)
    return [tensor.detach().permute(2, 0, 1, 3) for tensor in (output, *gradients)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_are_as_right_as_each_other(dtype: torch.dtype) -> None:
    """Both implementations are equally accurate, and neither makes the host wait."""
    chosen = document_attention_on("cuda", dtype, HEADS, KV_HEADS, DIM)
    if not isinstance(chosen.attend, Varlen):
        pytest.skip(chosen.how)
    read, results = documents(), []
    for attend in (chosen.attend, one_by_one):
        q, k, v, weights = given(dtype)
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = attend(q, k, v, read)
            gradients = torch.autograd.grad(output, inputs, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([output.detach(), *gradients])
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, ours, theirs, true in zip(names, *results, exact(dtype), strict=True):
        error, own = (float((tensor.double() - true).abs().max()) for tensor in (ours, theirs))
        assert error <= 2 * own, f"{name}: off by {error:.3g}, a call for each by {own:.3g}"
