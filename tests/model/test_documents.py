"""Edges of documents are read from the device once for all layers, and are right; attention stays within them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from megatron.model.documents import document_edges
from megatron.model.llama import causal_attention, document_attention

pytestmark = pytest.mark.unit

ON_HOST = {"tolist", "item", "nonzero", "cpu", "__bool__", "__int__"}


class Waits(TorchFunctionMode):
    """Counts what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in ON_HOST
        return func(*args, **(kwargs or {}))


def positions() -> torch.Tensor:
    """Three documents, one, and one of a token at the end, in samples of 8."""
    return torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 0]])


def operands() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, heads, 4, generator=generator, requires_grad=True) for heads in (4, 2, 2)]


def test_edges() -> None:
    assert document_edges(positions()) == [[0, 3, 5, 8], [0, 8], [0, 7, 8]]
    assert document_edges(torch.tensor([[3, 4, 0, 1]])) == [[0, 2, 4]]  # a sample that begins inside a document


def test_the_device_is_asked_once_for_all_layers_and_their_recomputation() -> None:
    given, layers = positions(), 4
    with Waits() as waits:
        q, k, v = operands()
        for _ in range(layers):
            q = checkpoint(document_attention, q, k, v, given, use_reentrant=False)
        q.sum().backward()
    assert waits.count == 1


def test_a_changed_tensor_is_read_again() -> None:
    given = positions()
    document_edges(given)
    given[1, 4:] = torch.arange(4)
    assert document_edges(given)[1] == [0, 4, 8]
    assert document_edges(positions())[1] == [0, 8]


@torch.inference_mode()
def test_in_inference_mode_changes_are_seen_too() -> None:
    given = positions()
    assert document_edges(given)[1] == [0, 8]
    given[1, 4:] = torch.arange(4)
    assert document_edges(given)[1] == [0, 4, 8]


def test_attention_is_that_of_each_document_alone() -> None:
    q, k, v = operands()
    found = document_attention(q, k, v, positions())
    for row, edges in enumerate(document_edges(positions())):
        for start, stop in itertools.pairwise(edges):
            alone = causal_attention(*(x[start:stop, row : row + 1] for x in (q, k, v)))
            assert torch.equal(found[start:stop, row : row + 1], alone)
