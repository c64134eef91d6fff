"""How a merge relates to its parents, by kind of tensor: norms and angles of deltas, and conflicting signs.

Sums are computed in float64 over every element. They are reported to six digits, so that the order in which threads
finish is not visible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arithmetic import TensorPlan, Workspace
from .errors import MergeError

WORKING_RANGE = 0.005  # DARE drops 90 to 99 % where deltas stay within it (arXiv:2311.03099)
_KINDS = {
    "embed_tokens": "embedding",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention out",
    "gate_proj": "MLP gate",
    "up_proj": "MLP up",
    "down_proj": "MLP down",
}
_NORMS, _HEAD, ALL = "norms", "head", "all"


def kind_of(tensor: str) -> str:
    """The kind of a tensor, by its Hugging Face name."""
    module = tensor.split(".")[-2]
    return _HEAD if module == "lm_head" else _KINDS.get(module, _NORMS)


@dataclass
class ParentSums:
    """Sums over one model's delta d and the merged delta m."""

    squares: float = 0.0  # of d
    product: float = 0.0  # of d and m
    smallest: float = 0.0
    largest: float = 0.0
    beyond: int = 0  # elements of |d| above WORKING_RANGE
    zeros: int = 0

    def add(self, other: list[float]) -> None:
        self.squares += other[0]
        self.product += other[1]
        self.smallest = min(self.smallest, other[2])
        self.largest = max(self.largest, other[3])
        self.beyond += int(other[4])
        self.zeros += int(other[5])

    @property
    def extent(self) -> float:
        return max(-self.smallest, self.largest)


@dataclass
class KindSums:
    """Sums over the tensors of one kind."""

    elements: int = 0
    conflicts: int = 0  # elements where two weighted deltas point in opposite directions
    merged_squares: float = 0.0
    parents: list[ParentSums] = field(default_factory=list)

    def add(self, row: list[Any]) -> None:
        elements, conflicts, merged, parents = row
        self.elements += elements
        self.conflicts += conflicts
        self.merged_squares += merged
        self.parents = self.parents or [ParentSums() for _ in parents]
        for sums, other in zip(self.parents, parents, strict=True):
            sums.add(other)

    def row(self) -> list[Any]:
        return [self.elements, self.conflicts, self.merged_squares, [list(vars(p).values()) for p in self.parents]]


class MergeReport:
    """Sums by kind of tensor; `labels` are those of the models, in the recipe's order."""

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels
        self.kinds: dict[str, KindSums] = {}

    def add(self, kind: str, row: list[Any]) -> None:
        self.kinds.setdefault(kind, KindSums()).add(row)

    def rows(self) -> dict[str, list[Any]]:
        """Rows for `add`, to combine this report with those of other shares."""
        return {kind: sums.row() for kind, sums in self.kinds.items()}

    def by_kind(self) -> dict[str, KindSums]:
        """Every kind in the order of a model, then their sum."""
        order = [*_KINDS.values(), _NORMS, _HEAD]
        total = KindSums()
        result = {kind: self.kinds[kind] for kind in order if kind in self.kinds}
        for sums in result.values():
            total.add(sums.row())
        return result | {ALL: total}

    def to_json(self) -> dict[str, Any]:
        """Norms, fractions and angles, rounded to six digits."""
        return {
            kind: {
                "elements": sums.elements,
                "conflicting_signs": _digits(sums.conflicts / sums.elements),
                "merged_delta_norm": _digits(math.sqrt(sums.merged_squares)),
                "models": {
                    label: {
                        "delta_norm": _digits(math.sqrt(p.squares)),
                        "cosine_with_merged_delta": _digits(cosine(p, sums)),
                        "smallest": _digits(p.smallest),
                        "largest": _digits(p.largest),
                        "beyond_working_range": _digits(p.beyond / sums.elements),
                        "unchanged": _digits(p.zeros / sums.elements),
                    }
                    for label, p in zip(self.labels, sums.parents, strict=True)
                },
            }
            for kind, sums in self.by_kind().items()
        }

    def warnings(self, dare: bool) -> list[str]:
        """Warnings about models without effect and, for DARE, about large deltas."""
        lines = []
        whole = self.by_kind()[ALL]
        for label, sums in zip(self.labels, whole.parents, strict=True):
            if not sums.squares:
                lines.append(f"{label} is equal to the model that its delta is taken from, so it has no effect")
            elif dare and sums.extent > WORKING_RANGE:
                lines.append(
                    f"{label}: its delta reaches {sums.extent:.3g}, and {sums.beyond / whole.elements:.2%} of it lies "
                    f"beyond {WORKING_RANGE}, the limit up to which DARE's authors found dropping harmless; compare "
                    f"with a merge at density 1"
                )
        return lines


def cosine(parent: ParentSums, kind: KindSums) -> float:
    """Cosine between a model's delta and the merged delta; 0 if either is zero."""
    scale = math.sqrt(parent.squares) * math.sqrt(kind.merged_squares)
    return parent.product / scale if scale else 0.0


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def tile_sums(plan: TensorPlan, work: Workspace, count: int) -> list[Any]:
    """A row for `MergeReport.add`, from the tile that `merge_tile` left in `work`."""
    merged = work.wide_merged[:count].copy_(work.merged_delta[:count])
    positive, negative = (flags[:count].zero_() for flags in work.directions)
    parents = []
    for term, buffer in zip(plan.terms, work.deltas, strict=False):
        delta = buffer[:count]
        up, down = torch.gt(delta, 0, out=work.flags[:count]), delta < 0
        unchanged = count - _count(up) - _count(down)
        if term.weight:
            positive |= up if term.weight > 0 else down
            negative |= down if term.weight > 0 else up
        parents.append(_parent_row(delta, merged, work.wide[:count], unchanged))
    conflicts = _count(positive.logical_and_(negative))
    return [count, conflicts, float(torch.dot(merged, merged)), parents]


def _count(flags: Tensor) -> int:
    return int(np.count_nonzero(flags.numpy()))  # many times faster than torch's


def _parent_row(delta: Tensor, merged: Tensor, wide: Tensor, zeros: int) -> list[float]:
    smallest, largest = (float(x) for x in torch.aminmax(delta))
    beyond = _count(delta.abs() > WORKING_RANGE) if max(-smallest, largest) > WORKING_RANGE else 0
    wide.copy_(delta)
    return [float(torch.dot(wide, wide)), float(torch.dot(wide, merged)), smallest, largest, beyond, zeros]


def table(report: MergeReport) -> list[list[str]]:
    """The report as a header and rows of text, one row per kind of tensor."""
    header = ["tensors", "conflicting signs", "merged delta"]
    for label in report.labels:
        header += [f"{label}: delta", "cosine", "range"]
    rows = [header]
    for kind, sums in report.by_kind().items():
        row = [kind, f"{sums.conflicts / sums.elements:.1%}", f"{math.sqrt(sums.merged_squares):.3g}"]
        for parent in sums.parents:
            row += [
                f"{math.sqrt(parent.squares):.3g}",
                f"{cosine(parent, sums):.2f}",
                f"{parent.smallest:.2g} to {parent.largest:.2g}",
            ]
        rows.append(row)
    return rows


def text_table(report: MergeReport) -> str:
    """The report for a terminal: one block per model, one line per kind of tensor."""
    kinds = report.by_kind()
    lines = [f"{'tensors':<16}{'elements':>16}{'conflicting signs':>20}{'norm of merged delta':>24}"]
    for kind, sums in kinds.items():
        share = f"{sums.conflicts / sums.elements:.1%}"
        lines.append(f"{kind:<16}{sums.elements:>16,}{share:>20}{math.sqrt(sums.merged_squares):>24.4g}")
    for i, label in enumerate(report.labels):
        lines += ["", label, f"{'tensors':<16}{'norm of delta':>16}{'cosine with merged':>20}{'range of delta':>24}"]
        for kind, sums in kinds.items():
            p = sums.parents[i]
            extent = f"{p.smallest:.2g} to {p.largest:.2g}"
            lines.append(f"{kind:<16}{math.sqrt(p.squares):>16.4g}{cosine(p, sums):>20.3f}{extent:>24}")
    return "\n".join(lines)


def joined(labels: list[str], shares: list[dict[str, list[Any]]]) -> MergeReport:
    """Combine the rows of all shares into one report."""
    report = MergeReport(labels)
    for share in shares:
        for kind, row in share.items():
            report.add(kind, row)
    if not report.kinds:
        raise MergeError("the shares hold no tensors")
    return report
