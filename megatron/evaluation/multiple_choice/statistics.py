"""Statistics of scores: their uncertainty, and tests of whether two checkpoints differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
CALIBRATION_BINS = 10


def wilson_interval(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); (0, 1) without observations."""
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact p of `gained` against `lost` items under equal chances (McNemar 1947); 1 if nothing changed."""
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def calibration_error(confidences: Sequence[float], correct: Sequence[bool]) -> float:
    """Expected calibration error: mean of |accuracy - mean confidence| over equal-width bins, weighted by items."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in zip(confidences, correct, strict=True):
        bins.setdefault(min(int(confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1), []).append((confidence, right))
    gaps = (abs(sum(right for _, right in part) - sum(value for value, _ in part)) for part in bins.values())
    return sum(gaps) / len(confidences) if confidences else 0.0


def softmax(scores: Sequence[float]) -> list[float]:
    """Normalized probabilities of options from their log-probabilities."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class PairedComparison:
    """Two checkpoints on the same items. `lost` are negative flips: right before, wrong now."""

    n: int
    before: int
    after: int
    gained: int
    lost: int

    @property
    def p_value(self) -> float:
        return mcnemar_exact(self.gained, self.lost)

    @property
    def negative_flip_rate(self) -> float:
        """Fraction of all items that were right before and are wrong now."""
        return self.lost / self.n


def compare_paired(before: Sequence[bool], after: Sequence[bool]) -> PairedComparison:
    """Compare two checkpoints item by item, from whether each item was answered correctly."""
    pairs = list(zip(before, after, strict=True))
    return PairedComparison(
        n=len(pairs),
        before=sum(before),
        after=sum(after),
        gained=sum(not b and a for b, a in pairs),
        lost=sum(b and not a for b, a in pairs),
    )
