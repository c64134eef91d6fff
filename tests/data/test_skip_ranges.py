"""Skipping ranges of samples equals reading a list without them."""

from __future__ import annotations

import random

import pytest

from megatron.data.skip_ranges import SampleRanges

pytestmark = pytest.mark.unit


def test_it_is_the_order_without_the_ranges() -> None:
    rng = random.Random(0)
    for _ in range(300):
        pairs = [sorted(rng.sample(range(40), 2)) for _ in range(rng.randrange(4))]
        ranges, position, end = SampleRanges(pairs), rng.randrange(30), rng.randrange(40, 60)
        left = [p for p in range(position, 200) if not any(a <= p < b for a, b in pairs)]
        assert [ranges.place(position, count) for count in range(50)] == left[:50]
        assert [ranges.after(position, count) for count in range(1, 50)] == [p + 1 for p in left[:49]]
        assert ranges.after(position, 0) == position
        assert ranges.kept(position, end) == len([p for p in left if p < end])
        # Read in two parts, like a run that is stopped and resumed.
        cut = rng.randrange(1, 20)
        after = ranges.after(position, cut)
        assert [ranges.place(after, count) for count in range(20)] == left[cut : cut + 20]


def test_touching_ranges_are_one() -> None:
    assert SampleRanges([[10, 20], [0, 5], [5, 8], [12, 30]]).ranges == [(0, 8), (10, 30)]
    assert SampleRanges([[0, 8], [10, 30]]).between(4, 12) == [(4, 8), (10, 12)]
