"""Selective recomputation gives the same gradients as storing activations, and frees their memory in between."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.selective import Recomputed, product

pytestmark = pytest.mark.unit


class Chain:
    """norm -> matrix -> activation -> matrix, with a residual, as in a layer; `calls` counts both kinds."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(16)
        self.matrices = nn.ModuleList([nn.Linear(16, 48, bias=False), nn.Linear(48, 16, bias=False)])
        self.calls: Counter[str] = Counter()
        for number, matrix in enumerate(self.matrices):
            matrix.register_forward_hook(lambda *_, name=f"matrix {number}": self.calls.update([name]))

    def norm_of(self, x: Tensor) -> Tensor:
        self.calls.update(["norm"])
        return self.norm(x)

    def activation(self, x: Tensor) -> Tensor:
        self.calls.update(["activation"])
        return F.silu(x) * x

    def stored(self, x: Tensor) -> Tensor:
        return x + self.matrices[1](self.activation(self.matrices[0](self.norm_of(x))))

    def recomputed(self, x: Tensor) -> Tensor:
        up = product(self.matrices[0], Recomputed(self.norm_of, x))
        return x + product(self.matrices[1], Recomputed(self.activation, up))

    def gradients(self, recomputed: bool, calls: int = 2) -> list[Tensor]:
        """Gradients of the input and all parameters, after `calls` forward and as many backward passes."""
        x = torch.randn(calls, 5, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        parameters = [*self.norm.parameters(), *self.matrices.parameters()]
        for parameter in parameters:
            parameter.grad = None
        outputs = [(self.recomputed if recomputed else self.stored)(part) for part in x.unbind()]
        for output in outputs:
            output.square().sum().backward()
        found = [tensor.grad for tensor in (x, *parameters)]
        assert all(gradient is not None for gradient in found)
        return [gradient.clone() for gradient in found if gradient is not None]


def test_gradients_are_the_same() -> None:
    """Equal except for the order in which parts of the input's gradient are summed."""
    chain = Chain()
    expected = chain.gradients(recomputed=False)
    for found, other in zip(chain.gradients(recomputed=True), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-6)


def test_no_product_is_computed_twice() -> None:
    chain = Chain()
    chain.gradients(recomputed=True, calls=1)
    assert chain.calls == {"norm": 2, "activation": 2, "matrix 0": 1, "matrix 1": 1}


def test_memory_is_free_until_the_gradient_comes() -> None:
    chain = Chain()
    x = torch.randn(5, 16, requires_grad=True)
    call = Recomputed(chain.norm_of, x)
    held = call.output.untyped_storage()
    assert held.nbytes() == x.nbytes
    up = chain.matrices[0](call.output)
    call.release(up)
    assert held.nbytes() == 0
    up.sum().backward()
    assert held.nbytes() == x.nbytes


def test_reading_freed_memory_would_be_detected() -> None:
    """The product's backward pass needs the data: without recomputation it fails instead of using freed memory."""
    chain = Chain()
    x = torch.randn(5, 16, requires_grad=True)
    call = Recomputed(chain.norm_of, x)
    up = chain.matrices[0](call.output)
    call.output.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        up.sum().backward()
