"""Renders images for viewing: bands as colors, values as 8 bits, several images in a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import DataError

GAP = 2  # pixels between the images of a grid
_NOTHING = 64  # gray where an image has no value


def colors(image: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """[height, width, bands] -> [height, width, 3]: the first three bands as red, green and blue, else the first as
    gray. `low` is black, `high` white, NaN dark gray."""
    shown = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
    values = shown.astype(np.float32)
    scaled = np.clip((values - low) / max(high - low, 1e-12) * 255, 0, 255)
    return np.where(np.isnan(values), _NOTHING, np.nan_to_num(scaled)).round().astype(np.uint8)


def picture_grid(rows: Sequence[Sequence[NDArray[Any]]]) -> NDArray[np.uint8]:
    """[pixels, pixels, 3] of images of one shape, row by row, scaled alike by the 0.5th and 99.5th percentile."""
    everything = np.concatenate([np.asarray(image).reshape(-1) for row in rows for image in row])
    known = everything[~np.isnan(everything.astype(np.float32))]
    low, high = (float(value) for value in np.percentile(known, [0.5, 99.5])) if len(known) else (0.0, 1.0)
    height, width, _ = rows[0][0].shape
    columns = max(map(len, rows))
    canvas = np.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + GAP), c * (width + GAP)
            canvas[top : top + height, left : left + width] = colors(image, low, high)
    return canvas


def enlarged(picture: NDArray[np.uint8], side: int = 800) -> NDArray[np.uint8]:
    """The picture with each pixel repeated until its longer side has about `side` pixels."""
    factor = max(1, side // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Save an enlarged picture as PNG. DataError without the package pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{path}: writing pictures needs the package pillow (pip install .[images])") from error
    Image.fromarray(enlarged(picture)).save(path)
