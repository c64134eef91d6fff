"""Stamps of real galaxies: the corner of the Hubble Deep Field that scikit-image ships (NASA, public domain).

    python examples/astropt/hubble.py --output hubble.npz

Sources are regions three standard deviations above the sky; those whose stamp of 64 x 64 pixels lies within the picture
are cut out. They are too few to train on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIDE = 64
FEWEST = 40  # pixels in a source


def stamps(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Stamps [n, 64, 64, 3] from a picture [height, width, 3], the largest source first."""
    from scipy import ndimage

    light = picture.astype(np.float32).mean(-1)
    sky = np.median(light)
    deviation = 1.4826 * np.median(np.abs(light - sky))
    smooth = ndimage.gaussian_filter(light - sky, 1.5)
    labels, count = ndimage.label(smooth > 3 * deviation)
    numbers = np.arange(1, count + 1)
    areas = ndimage.sum_labels(np.ones_like(light), labels, numbers)
    places = np.array(ndimage.center_of_mass(smooth, labels, numbers)).round().astype(int) - SIDE // 2
    inside = ((places >= 0) & (places + SIDE <= light.shape)).all(axis=1) & (areas >= FEWEST)
    order = np.argsort(-areas[inside], kind="stable")
    return np.stack([picture[top : top + SIDE, left : left + SIDE] for top, left in places[inside][order]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from skimage import data

    found = stamps(np.asarray(data.hubble_deep_field()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.output, images=found)
    print(f"{len(found)} stamps of {SIDE} x {SIDE} x 3 in {options.output}")


if __name__ == "__main__":
    main()
