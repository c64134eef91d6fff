"""DARE's masks: the published generator, and draws that depend only on the element's position."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tools.merge.masks import RESOLUTION, draws, keep_mask, mask_key, threshold

pytestmark = pytest.mark.unit

_MASK64 = (1 << 64) - 1
# Random123's known answers for philox4x64-10: (counter, key, output).
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (_MASK64, _MASK64, _MASK64, _MASK64),
        (_MASK64, _MASK64),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x64-10 in Python integers, following the paper."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(second >> 64) ^ x[1] ^ k0, second & _MASK64, (first >> 64) ^ x[3] ^ k1, first & _MASK64]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK64, (k1 + 0xBB67AE8584CAA73B) & _MASK64
    return tuple(x)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_the_oracle_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]
) -> None:
    assert philox(counter, key) == output


def test_draws_follow_the_scheme() -> None:
    """Element i: 16 bits of Philox at counter i // 16 + 1, under the first half of a SHA-256."""
    digest = hashlib.sha256(b"7\0model.norm.weight\0org/name").digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    expected = []
    for block in range(40):
        for word in philox((block + 1, 0, 0, 0), key):
            expected += [word >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    assert draws(mask_key(7, "model.norm.weight", "org/name"), 0, 640).tolist() == expected


def test_a_piece_equals_the_slice_of_the_whole() -> None:
    key = mask_key(3, "t", "m")
    whole = draws(key, 0, 5000)
    chance = np.random.default_rng(0)
    for _ in range(200):
        start = int(chance.integers(0, 4990))
        count = int(chance.integers(1, 5000 - start))
        assert np.array_equal(draws(key, start, count), whole[start : start + count])


def test_a_distant_piece_needs_no_earlier_draws() -> None:
    """The 70B's embedding has 1.05e9 elements; no elements before a piece are drawn."""
    at = 1_050_673_151
    words = [w >> s & 0xFFFF for w in philox((at // 16 + 1, 0, 0, 0), (5, 9)) for s in (0, 16, 32, 48)]
    assert draws(np.array([5, 9], "<u8"), at, 1)[0] == words[at % 16]


@pytest.mark.parametrize("density", [0.9, 0.53, 0.5, 0.1, 0.001])
def test_the_kept_fraction_equals_the_density(density: float) -> None:
    count = 1 << 20
    kept = keep_mask(mask_key(1, "t", "m"), 0, count, threshold(density)).mean()
    assert abs(kept - density) < 5 * (density * (1 - density) / count) ** 0.5 + 0.5 / RESOLUTION


def test_models_tensors_and_seeds_have_independent_masks() -> None:
    count, limit = 1 << 18, threshold(0.5)
    keys = [mask_key(s, t, m) for s in (1, 2) for t in ("a", "b") for m in ("x", "y")]
    masks = np.array([keep_mask(key, 0, count, limit) for key in keys], float) - 0.5
    correlation = masks @ masks.T / (0.25 * count)
    assert np.abs(correlation - np.eye(len(keys))).max() < 6 / count**0.5
