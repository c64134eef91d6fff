"""Document boundaries are read once, before the layers; attention stays within documents in every implementation."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megatron.model import attention
from megatron.model.attention import Varlen, causal_attention, document_attention, document_attention_on, one_by_one
from megatron.model.documents import Documents, as_message, from_message
from tests.support.varlen import Newer, Older, attended

pytestmark = pytest.mark.unit

TOLERANCE = 1e-5
EDGES = ((0, 3, 5, 8), (0, 8), (0, 7, 8))


def positions() -> Tensor:
    """Samples of 8 tokens with three documents, with one, and with a one-token document at the end."""
    return torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 0]])


def operands(heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, n, 4, generator=generator, requires_grad=True) for n in (heads, 2, 2)]


def results(attend: attention.Attend, heads: int = 4) -> list[Tensor]:
    """Output and gradients."""
    q, k, v = operands(heads)
    output = attend(q, k, v, Documents.at(positions()))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), weights)]


# --- reading


def test_edges_offsets_and_the_longest() -> None:
    documents = Documents.at(positions())
    assert documents.edges == EDGES
    assert documents.offsets.tolist() == [0, 3, 5, 8, 16, 23, 24]
    assert documents.offsets.dtype == torch.int32
    assert documents.longest == 8
    assert Documents.at(torch.tensor([[3, 4, 0, 1]])).edges == ((0, 2, 4),)  # a sample that begins inside a document


def test_between_stages_positions_are_a_tensor() -> None:
    hidden, given = torch.zeros(2), positions()
    stream = from_message((hidden, given))
    assert stream[1].edges == EDGES
    assert as_message(stream)[1] is given
    assert as_message(from_message(hidden)) is hidden


@pytest.mark.parametrize("way", [one_by_one, document_attention, None], ids=["one by one", "chosen", "varlen"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_and_their_recomputation_read_no_value_of_a_tensor(way: Any, reentrant: bool) -> None:
    """Fake tensors have no values: `item`, `tolist`, `nonzero` and whatever else would wait for a device raise.

    None means torch's own varlen attention, which needs no kernel for such tensors. Mutation: let `one_by_one` read
    `Documents.at(documents.positions)`.
    """
    if way is None:
        function = attention._varlen_function()
        if function is None:
            pytest.skip("this torch has no torch.nn.attention.varlen")
        way = Varlen(function)
    on_host = positions()
    with FakeTensorMode() as fake:
        documents = Documents.at(fake.from_tensor(on_host), on_host)
        q, k, v = (fake.from_tensor(tensor) for tensor in operands())
        for _ in range(3):
            q = checkpoint(way, q, k, v, documents, use_reentrant=reentrant, preserve_rng_state=False)
        q.sum().backward()
        with pytest.raises(DataDependentOutputException):
            Documents.at(documents.positions)
        with pytest.raises(DataDependentOutputException):
            documents.offsets.tolist()


# --- attention


def test_attention_is_that_of_each_document_alone() -> None:
    q, k, v = operands()
    found = document_attention(q, k, v, Documents.at(positions()))
    for row, edges in enumerate(EDGES):
        for start, stop in itertools.pairwise(edges):
            alone = causal_attention(*(x[start:stop, row : row + 1] for x in (q, k, v)))
            assert torch.equal(found[start:stop, row : row + 1], alone)


@pytest.mark.parametrize("heads", [2, 4], ids=["all heads", "grouped"])
@pytest.mark.parametrize("reference", [Newer, Older])
def test_varlen_is_called_as_torch_says_and_gives_the_same(reference: type[Newer | Older], heads: int) -> None:
    """A float64 substitute is called, because the real function needs a GPU. Mutations: not causal; `longest` of the
    first sample only; offsets that restart in each sample; key heads tiled instead of repeated."""
    function = reference()
    for ours, theirs in zip(results(Varlen(function), heads), results(one_by_one, heads), strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < TOLERANCE
    (call,) = function.calls
    kv_heads = 2 if reference is Newer else heads
    assert [tuple(call[name].shape) for name in ("query", "key", "value")] == [
        (24, n, 4) for n in (heads, kv_heads, kv_heads)
    ]
    assert call["cu_seq_q"] is call["cu_seq_k"]
    assert call["cu_seq_q"].dtype == torch.int32
    assert call["cu_seq_q"].device == call["query"].device
    assert (call["max_q"], call["max_k"]) == (8, 8)


# --- the choice


@pytest.fixture
def _fresh() -> Any:
    document_attention_on.cache_clear()
    yield
    document_attention_on.cache_clear()


def chosen(kind: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[Any, str]:
    found = document_attention_on(kind, dtype, 4, 2, 16)
    return found.attend, found.how


@pytest.mark.usefixtures("_fresh")
def test_what_is_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    each = "a call of attention for each"
    assert chosen("cpu") == (one_by_one, f"{each} (varlen attention needs a GPU)")
    assert chosen(dtype=torch.float32) == (
        one_by_one,
        f"{each} (varlen attention computes in bfloat16 or float16, not float32)",
    )
    on_host: Callable[..., str | None] = attention._failure
    monkeypatch.setattr(attention, "_failure", lambda way, device, *rest: on_host(way, torch.device("cpu"), *rest))
    monkeypatch.setattr(attention, "_varlen_function", Newer)
    way, how = chosen(dtype=torch.float16)
    assert isinstance(way, Varlen)
    assert how == "all in one call of torch.nn.attention.varlen"
    monkeypatch.setattr(attention, "_varlen_function", lambda: None)
    assert chosen() == (
        one_by_one,
        f"{each} (torch {torch.__version__} has no torch.nn.attention.varlen)",
    )


def test_a_torch_without_varlen_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert attention._varlen_function() is None


def half_a_gradient(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, *_: Any, is_causal: bool) -> Tensor:
    return attended(query, (key + key.detach()) / 2, value, cu_seq_q, is_causal)


def one_text(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, *_: Any, is_causal: bool) -> Tensor:
    return attended(query, key, value, cu_seq_q[[0, -1]], is_causal)


def not_a_number(query: Tensor, key: Tensor, value: Tensor, *_: Any, is_causal: bool) -> Tensor:
    return query * torch.nan + key.sum() + value.sum()


def refused(query: Tensor, *_: Any, is_causal: bool) -> Tensor:
    raise RuntimeError("no kernel for this device\nCall stack:")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Newer(), None),
        (Older(), None),
        (one_text, "the output of varlen attention is off by"),
        (not_a_number, "the output of varlen attention is off by nan"),
        (half_a_gradient, "the gradient of k of varlen attention is off by"),
        (refused, "varlen attention failed: no kernel for this device"),
    ],
    ids=["newer", "older", "documents mixed", "nan", "wrong gradient", "refused"],
)
def test_varlen_is_tried_before_it_is_used(function: Callable[..., Tensor], reason: str | None) -> None:
    found = attention._failure(Varlen(function), torch.device("cpu"), torch.bfloat16, 4, 2, 16)
    assert (found is None) if reason is None else (found is not None and found.startswith(reason)), found
