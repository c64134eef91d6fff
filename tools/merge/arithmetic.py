"""The merge methods on a tile: the same elements of every parent, in fp32, without rounding to 16 bits.

Every operation is elementwise and models are summed in the recipe's order, so an element's bits do not depend on the
tile it is in. Statistics of the whole tensor come in a `TensorPlan`. The order of operations is that of mergekit with
`dtype: float32`, bit for bit; the result is the value that its `out_dtype` rounds.

    delta methods    base + lambda * consensus of  w_i * (factor_i * keep_i * (m_i - base_i))
    linear           sum of w_i * m_i, divided by the sum of w_i if `normalize`
    slerp            a * base + b * m, with a and b from the angle between the two whole tensors
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .masks import RESOLUTION, keep_mask

ELECTION_FREE_EPSILON = 1e-8  # a smaller sum of weights is replaced by 1


@dataclass(frozen=True)
class Trim:
    """TIES keeps magnitudes above `magnitude`, and those equal to it up to element `last` (None: all of them)."""

    magnitude: float
    last: int | None


@dataclass(frozen=True)
class Term:
    """One model's contribution. `parent` and `base` are indices into the list of parents (`base` is -1 for linear)."""

    parent: int
    base: int
    weight: float
    limit: int = RESOLUTION  # DARE: draws below this are kept
    key: np.ndarray | None = None
    factor: float = 1.0  # DARE's rescaling
    trim: Trim | None = None


@dataclass(frozen=True)
class TensorPlan:
    """Everything needed to merge one tensor. `base` is an index into the list of parents (-1: none)."""

    method: str
    terms: tuple[Term, ...]
    base: int
    normalize: bool = False
    elects: bool = False
    scale: float = 1.0  # mergekit's lambda
    slerp: tuple[float, float] = (0.0, 0.0)  # coefficients of the base and of the other model


class Workspace:
    """A thread's fp32 buffers for tiles of at most `elements`."""

    def __init__(self, parents: int, terms: int, elements: int) -> None:
        def floats() -> Tensor:
            return torch.empty(elements)

        self.parents = [floats() for _ in range(parents)]
        self.deltas = [floats() for _ in range(terms)]
        self.merged_delta, self.merged = floats(), floats()
        self.part, self.clamped = floats(), floats()
        self.total, self.positive, self.negative = floats(), floats(), floats()
        self.positive_weight, self.negative_weight = floats(), floats()
        self.flags = torch.empty(elements, dtype=torch.bool)
        # Scratch space for the report and for fused multiply-adds.
        self.directions = [torch.empty(elements, dtype=torch.bool) for _ in range(2)]
        self.wide, self.wide_merged = (torch.empty(elements, dtype=torch.float64) for _ in range(2))

    @staticmethod
    def nbytes(parents: int, terms: int, elements: int) -> int:
        """Memory of a workspace, including the draws and masks of a tile."""
        return elements * (4 * (parents + terms + 10) + 16 + 3 + 16)


def merge_tile(plan: TensorPlan, work: Workspace, start: int, count: int) -> Tensor:
    """The merged tile in fp32, from `work.parents`. Element 0 of the tile is element `start` of the tensor.

    Leaves each model's delta in `work.deltas` and the merged delta in `work.merged_delta`, relative to the base, or to
    the first model if the method has no base.
    """
    if plan.method == "linear":
        _linear(plan, work, count)
    elif plan.method == "slerp":
        _slerp(plan, work, count)
    else:
        _deltas(plan, work, start, count)
    return work.merged[:count]


def _deltas(plan: TensorPlan, work: Workspace, start: int, count: int) -> None:
    part, clamped, total = work.part[:count], work.clamped[:count], work.total[:count]
    positive, negative = work.positive[:count], work.negative[:count]
    flags = work.flags[:count]
    total.zero_()
    if plan.elects:
        for sums in (positive, negative, work.positive_weight[:count], work.negative_weight[:count]):
            sums.zero_()
    for i, term in enumerate(plan.terms):
        delta = torch.sub(
            work.parents[term.parent][:count], work.parents[term.base][:count], out=work.deltas[i][:count]
        )
        _keep(term, delta, part, start, flags)
        if term.factor != 1:
            part.mul_(term.factor)
        part.mul_(term.weight)
        total.add_(part)
        if plan.elects:
            # Instead of stacking the deltas, sum each sign separately; the election selects one of the sums.
            positive.add_(torch.clamp(part, min=0, out=clamped))
            negative.add_(torch.clamp(part, max=0, out=clamped))
            if plan.normalize:
                work.positive_weight[:count].add_(torch.gt(part, 0, out=flags), alpha=term.weight)
                work.negative_weight[:count].add_(torch.lt(part, 0, out=flags), alpha=term.weight)
    merged = work.merged_delta[:count]
    if plan.elects:
        _elect(plan, work, merged, count)
    else:
        merged.copy_(total)
        if plan.normalize:
            merged.div_(_weight_sum(plan))
    if plan.scale != 1:
        merged.mul_(plan.scale)
    torch.add(work.parents[plan.base][:count], merged, out=work.merged[:count])


def _keep(term: Term, delta: Tensor, part: Tensor, start: int, flags: Tensor) -> None:
    """Write the kept elements of a delta to `part`. Multiplying by a mask is five times as fast as selecting."""
    if term.limit < RESOLUTION:
        assert term.key is not None
        mask = keep_mask(term.key, start, delta.numel(), term.limit)
        torch.mul(delta, torch.from_numpy(mask), out=part)
    elif term.trim is not None:
        torch.abs(delta, out=part)
        torch.mul(delta, trim_mask(term.trim, part, start, flags), out=part)
    else:
        part.copy_(delta)


def trim_mask(trim: Trim, magnitudes: Tensor, start: int, out: Tensor) -> Tensor:
    """Mask of the elements that TIES keeps; `magnitudes` begins at element `start` of the tensor."""
    if trim.last is None or start + magnitudes.numel() - 1 <= trim.last:
        return torch.ge(magnitudes, trim.magnitude, out=out)
    torch.gt(magnitudes, trim.magnitude, out=out)
    if start <= trim.last:
        tail = trim.last - start + 1
        out[:tail] |= magnitudes[:tail] == trim.magnitude
    return out


def _elect(plan: TensorPlan, work: Workspace, merged: Tensor, count: int) -> None:
    """Sum the deltas whose sign agrees with that of the total; a total of zero counts as positive."""
    total, flags = work.total[:count], work.flags[:count]
    torch.mul(work.positive[:count], torch.ge(total, 0, out=flags), out=merged)
    merged.add_(work.negative[:count].mul_(torch.lt(total, 0, out=flags)))
    if plan.normalize:
        divisor = work.negative_weight[:count].mul_(flags)
        divisor.add_(work.positive_weight[:count].mul_(torch.ge(total, 0, out=flags)))
        divisor.add_(torch.eq(divisor, 0, out=flags))
        merged.div_(divisor)


def _weight_sum(plan: TensorPlan) -> Tensor:
    """The sum of the weights, added in fp32; 1 if it is nearly zero."""
    total = torch.tensor([term.weight for term in plan.terms], dtype=torch.float32).reshape(-1, 1).sum(dim=0)
    total[total.abs() < ELECTION_FREE_EPSILON] = 1
    return total


def _linear(plan: TensorPlan, work: Workspace, count: int) -> None:
    # A fused multiply-add, done in float64 so that it is fused on any processor: the product of two fp32 numbers is
    # exact. torch's `addcmul_`, which mergekit uses, gives different bits on processors without such an instruction.
    total, wide, sums = work.total[:count].zero_(), work.wide[:count], work.wide_merged[:count]
    for term in plan.terms:
        wide.copy_(work.parents[term.parent][:count]).mul_(float(np.float32(term.weight)))
        total.copy_(wide.add_(sums.copy_(total)))
    merged = work.merged[:count].copy_(total)
    if plan.normalize:
        weights = torch.tensor([[term.weight for term in plan.terms]], dtype=torch.float32)
        merged.div_(weights.sum(dim=1))
    _differences(plan, work, count)


def _slerp(plan: TensorPlan, work: Workspace, count: int) -> None:
    of_base, of_other = plan.slerp
    other = plan.terms[0]
    torch.mul(work.parents[plan.base][:count], of_base, out=work.merged[:count])
    torch.mul(work.parents[other.parent][:count], of_other, out=work.part[:count])
    work.merged[:count].add_(work.part[:count])
    _differences(plan, work, count)


def _differences(plan: TensorPlan, work: Workspace, count: int) -> None:
    """Deltas for the report of a method that computes none: relative to the base, or to the first model."""
    reference = work.parents[plan.base if plan.base >= 0 else plan.terms[0].parent][:count]
    for i, term in enumerate(plan.terms):
        torch.sub(work.parents[term.parent][:count], reference, out=work.deltas[i][:count])
    torch.sub(work.merged[:count], reference, out=work.merged_delta[:count])


def slerp_coefficients(t: float, squares_a: float, squares_b: float, dot: float) -> tuple[float, float]:
    """Coefficients of two tensors for a point at `t` on the arc between their directions.

    Linear if they are (anti)parallel to within a cosine of 0.9995, as in mergekit.
    """
    norm_a, norm_b = math.sqrt(squares_a), math.sqrt(squares_b)
    cosine = dot / ((norm_a if norm_a > 1e-8 else 1.0) * (norm_b if norm_b > 1e-8 else 1.0))
    cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > 0.9995:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
