"""Selective recomputation: what is cheap to recompute is not stored for the backward pass.

Korthikanti et al. 2022 recompute the attention core; here norms and SwiGLU are recomputed as well, so that a layer
stores only its inputs and the outputs of its matrix products. Each recomputed output is the input of a product, which
saves it for its weight's gradient. Its memory is freed as soon as the product is done, and refilled when the gradient
of the product's output arrives: no product is computed twice, and nothing is recomputed before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Recomputed:
    """One call of a function whose output is not stored for the backward pass.

    `output` is valid until `release`. The function must not communicate, and its output must not share memory with
    other tensors.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], given: Tensor) -> None:
        self.function, self._given = function, given
        self._again: tuple[Tensor, Tensor] | None = None  # input and output, with the graph between them
        self.output: Tensor = _Recomputing.apply(given, self)

    def release(self, result: Tensor) -> None:
        """Free the output's memory until the gradient of `result`, the product computed from it, arrives."""
        self._memory = self.output.data  # same memory, separate version counter: autograd sees no modification
        self._bytes = self._memory.untyped_storage().nbytes()
        result.register_hook(self._fill)
        self._memory.untyped_storage().resize_(0)
        del self.output

    def _fill(self, gradient: Tensor) -> None:
        """Recompute the output, with its graph, into the memory that the product's backward pass reads."""
        given = self._given.detach().requires_grad_(self._given.requires_grad)
        with torch.enable_grad():
            again = self.function(given)
        self._memory.untyped_storage().resize_(self._bytes)
        self._memory.copy_(again.detach())
        self._again = (given, again)
        del self._memory, self._given

    def gradient_of_input(self, gradient: Tensor) -> Tensor | None:
        assert self._again is not None, "the output was not released"
        given, again = self._again
        self._again = None
        torch.autograd.backward(again, gradient)
        return given.grad


def product(matrix: nn.Module, given: Recomputed) -> Tensor:
    """Apply `matrix` to an output that is freed, and recomputed for the gradient of the matrix's weight."""
    result: Tensor = matrix(given.output)
    given.release(result)
    return result


class _Recomputing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, call: Recomputed) -> Tensor:
        ctx.call = call
        with torch.no_grad():
            return call.function(given)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return ctx.call.gradient_of_input(gradient), None
