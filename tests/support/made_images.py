"""Pairs of small images for tests, made by the importer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.datasets.preprocess_images import main


def blobs(count: int, side: int, bands: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """[count, side, side, bands]: smooth blobs of random position, width and color on weak noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    images = np.empty((count, side, side, bands), np.uint8)
    for number in range(count):
        cy, cx = rng.uniform(side / 4, 3 * side / 4, 2)
        width = rng.uniform(side / 8, side / 3)
        color = rng.uniform(80, 200, bands)
        blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width**2))[..., None] * color
        images[number] = np.clip(20 + blob + rng.normal(0, 4, (side, side, bands)), 0, 255)
    return images


def import_archive(folder: Path, name: str, images: NDArray[Any], *options: str, **properties: NDArray[Any]) -> str:
    """Import images with their properties; returns the prefix of the pair of files."""
    folder.mkdir(parents=True, exist_ok=True)
    archive, prefix = folder / f"{name}.npz", folder / name
    np.savez(archive, images=images, **properties)
    code = main(["--input", str(archive), "--output-prefix", str(prefix), "--workers", "1", *options])
    assert code == 0
    return str(prefix)
