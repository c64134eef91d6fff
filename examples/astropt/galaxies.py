"""Galaxies as a survey would see them, rendered by GalSim from known properties.

    python examples/astropt/galaxies.py --count 4400 --output galaxies.npz

Each is a bulge and an inclined disk, with knots of young stars in blue ones, at a redshift that affects color, size and
brightness. The three bands have their own seeing and sky noise and are stretched by arcsinh to 8 bits, like survey
JPEGs. The simulated population is not realistic, but its true properties are known. GalSim is Rowe et al. 2015.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIDE = 64  # pixels
PIXEL = 0.36  # arcsec
SEEING = (1.29, 1.18, 1.11)  # full width at half maximum in g, r and z, arcsec
SKY = (1.0, 1.3, 2.2)  # standard deviation of a pixel in each band
SOFTENING = np.array([6.4, 4.0, 3.0], np.float32)  # of the stretch, in z, r and g
NAMES = ("mag_r", "g_r", "r_z", "log_re", "bulge_fraction", "axis_ratio", "redshift", "cos_2pa", "sin_2pa")


def galaxy(seed: int, noise: float, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Image [64, 64, 3] in z, r and g before the stretch, and properties; they depend on the arguments alone."""
    import galsim

    # Draw the properties: colors, brightness and size follow type, bulge fraction and redshift z.
    rng = np.random.default_rng([seed, number])
    z = rng.gamma(3.0, 0.06) + 0.02
    red = rng.random() < 0.45  # early types, the others are late
    bulge_fraction = rng.beta(4, 2.2) if red else rng.beta(1.2, 5)
    g_r = (0.75 if red else 0.38) + 0.25 * bulge_fraction + 1.6 * z + rng.normal(0, 0.05)
    r_z = (0.55 if red else 0.32) + 0.15 * bulge_fraction + 0.9 * z + rng.normal(0, 0.05)
    mag_r = np.clip(15.4 + 5 * np.log10(z / 0.1) + rng.normal(1.4, 0.6), 14.5, 19.5)
    radius = np.clip(10 ** (rng.normal(0.5 if red else 0.62, 0.18) - 0.12 * (mag_r - 17.0)), 0.8, 9.0)
    axis_ratio = rng.uniform(0.15, 1.0)
    angle = rng.uniform(0, np.pi)
    flux_r = 25 * 10 ** (-0.4 * (mag_r - 22.5))
    flux = flux_r * np.array([10 ** (-0.4 * g_r), 1.0, 10 ** (0.4 * r_z)])
    of_bulge = bulge_fraction * np.array([10**-0.1, 1.0, 10**0.06])  # the bulge is redder than the disk
    of_bulge = of_bulge / (of_bulge + 1 - bulge_fraction)

    # Build the profiles: disk, bulge, and knots of young stars in blue galaxies.
    inclination = np.arccos(np.sqrt(max(axis_ratio**2 - 0.01, 0) / 0.99))
    disk = galsim.InclinedExponential(inclination * galsim.radians, half_light_radius=radius)
    core = max(0.35 * radius, 0.3)
    bulge = galsim.Sersic(n=3.0 if red else 2.0, half_light_radius=core, trunc=6 * core)
    bulge = bulge.shear(q=1 - (1 - axis_ratio) * 0.35, beta=0 * galsim.degrees)
    deviate = galsim.BaseDeviate(int(rng.integers(1, 2**31)))
    knots = None
    if not red and bulge_fraction < 0.5:
        profile = galsim.Exponential(half_light_radius=radius)
        knots = galsim.RandomKnots(npoints=int(rng.integers(10, 40)), profile=profile, rng=deviate)
        knots = knots.shear(q=max(axis_ratio, 0.2), beta=0 * galsim.degrees)
    shift = rng.uniform(-0.5, 0.5, 2) * PIXEL
    settings = galsim.GSParams(maximum_fft_size=16384, folding_threshold=2e-2, maxk_threshold=5e-3)
    # Render each band with its seeing and sky noise.
    image = np.empty((SIDE, SIDE, 3), np.float32)
    for band in range(3):
        outside = disk if knots is None else disk * 0.8 + knots * (0.2 * (1.4, 1.0, 0.7)[band])
        light = (bulge * of_bulge[band] + outside * (1 - of_bulge[band])) * flux[band]
        light = light.rotate(angle * galsim.radians).shift(*shift)
        seen = galsim.Convolve(light, galsim.Moffat(beta=3.5, fwhm=SEEING[band]), gsparams=settings)
        pixels = seen.drawImage(nx=SIDE, ny=SIDE, scale=PIXEL, dtype=np.float32)
        pixels.addNoise(galsim.GaussianNoise(deviate, sigma=SKY[band] * noise))
        image[..., 2 - band] = pixels.array
    ellipticity = 1 - axis_ratio
    shape = (ellipticity * np.cos(2 * angle), ellipticity * np.sin(2 * angle))
    truth = (mag_r, g_r, r_z, np.log10(radius), bulge_fraction, axis_ratio, z, *shape)
    return image, np.array(truth, np.float32)


def stretched(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert fluxes to 8 bits; a flux of 0 becomes dark gray, so that the noise of the sky is kept."""
    values = np.arcsinh(images / SOFTENING) / 5
    return np.clip((values + 0.15) / 1.15 * 255, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first galaxy; each number has its own")
    parser.add_argument("--noise", type=float, default=1.0, help="sky noise, as a multiple of the survey's")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True, help=".npz for tools/datasets/preprocess_images.py")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count)
    with Pool(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(partial(galaxy, options.seed, options.noise), numbers, chunksize=20)
    images = stretched(np.stack([image for image, _ in made]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    truth = np.stack([properties for _, properties in made])
    ids = np.array([f"g{number:06d}" for number in numbers])
    np.savez_compressed(options.output, images=images, truth=truth, names=np.array(NAMES), ids=ids)
    print(f"{len(images)} galaxies of {SIDE} x {SIDE} x 3 in {options.output}")


if __name__ == "__main__":
    main()
