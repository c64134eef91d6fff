"""Non-finite losses and gradients: poison, propagation and the final check, on plain tensors."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.engine.nonfinite import SuspiciousLossError, check_finite, poisoned, propagate
from megatron.engine.protocol import StepResult

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_not_a_number_stops(loss: float, norm: float) -> None:
    with pytest.raises(SuspiciousLossError, match="iteration 7"):
        check_finite(StepResult(loss, norm, applied=True), 7)
    check_finite(StepResult(1.0, 1.0, applied=True), 7)


def test_a_finite_loss_keeps_its_gradient_and_an_infinite_one_poisons_it() -> None:
    for value, expected in ((3.0, 2.0), (math.inf, math.nan), (math.nan, math.nan)):
        weight = torch.ones((), requires_grad=True)
        loss = 2.0 * weight + (value - 2.0)
        poisoned(loss).backward()
        assert weight.grad is not None
        assert float(weight.grad) == expected or (math.isnan(expected) and bool(weight.grad.isnan()))


def test_a_broken_replicated_gradient_shows_in_every_sharded_one() -> None:
    replicated, sharded = [torch.ones(3), torch.ones(2)], [torch.ones(2, 2), torch.ones(4)]
    propagate(replicated, sharded)
    assert all(bool((gradient == 1).all()) for gradient in sharded)
    replicated[1][0] = math.inf
    propagate(replicated, sharded)
    assert all(bool(gradient.isnan().any()) for gradient in sharded)
    propagate(replicated, [])
