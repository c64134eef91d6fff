"""The simulated galaxies and real stamps of examples/astropt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.unit


def test_a_galaxy_is_the_same_whoever_renders_it() -> None:
    pytest.importorskip("galsim")
    from examples.astropt.galaxies import NAMES, galaxy, stretched

    (image, truth), (again, _), (clean, same) = (galaxy(7, noise, 5) for noise in (1.0, 1.0, 0.2))
    assert np.array_equal(image, again)
    assert truth.shape == (len(NAMES),)
    assert np.array_equal(truth, same), "the noise is not the galaxy"
    corner = (slice(0, 12), slice(0, 12))
    assert clean[corner].std() < 0.4 * image[corner].std()
    picture = stretched(clean[None])[0]
    assert picture.dtype == np.uint8
    middle = picture[28:36, 28:36].mean()
    assert middle > picture[corner].mean() + 5


def test_the_bands_are_red_green_and_blue() -> None:
    """A redder galaxy is brighter in z than in g."""
    pytest.importorskip("galsim")
    from examples.astropt.galaxies import NAMES, galaxy

    for number in range(4):
        image, truth = galaxy(7, 0.0, number)
        flux = image.sum((0, 1))
        r_z = 2.5 * np.log10(flux[0] / flux[1])
        assert r_z == pytest.approx(truth[NAMES.index("r_z")], abs=0.15)


def test_stamps_hold_sources_and_lie_inside() -> None:
    from examples.astropt.hubble import SIDE, stamps

    rng = np.random.default_rng(0)
    picture = rng.normal(30, 2, (200, 300, 3)).clip(0, 255)
    for top, left in ((100, 150), (20, 60), (150, 250)):  # the second is too near the edge
        picture[top - 6 : top + 6, left - 6 : left + 6] += 120
    found = stamps(picture.clip(0, 255).astype(np.uint8))
    assert found.shape == (2, SIDE, SIDE, 3)
    assert all(one[26:38, 26:38].mean() > 100 for one in found)


def test_stamps_are_measured() -> None:
    """An ellipse: its axis ratio, and the order of brightness, color and size."""
    from examples.astropt.predictions import measured

    y, x = np.indices((64, 64)) - 31.5

    def stamp(sigma: float, ratio: float, light: float, blue: float = 1.0) -> Any:
        profile = light * np.exp(-(x**2 + (y / ratio) ** 2) / (2 * sigma**2))
        return (30 + np.stack([profile, profile, blue * profile], axis=-1)).astype(np.uint8)

    thin, round_, faint, blue = stamp(4, 0.5, 200), stamp(4, 1, 200), stamp(4, 1, 100), stamp(4, 1, 200, 1.1)
    assert abs(measured(thin)[3] - 0.5) < 0.05
    assert measured(round_)[3] > 0.98
    assert measured(faint)[0] > measured(round_)[0]
    assert measured(blue)[1] < measured(round_)[1]
    assert measured(stamp(6, 1, 200))[2] > measured(round_)[2]
