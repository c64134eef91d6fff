"""What `inspect_data.py` shows of a pair of images: counts, a grid of some images, and their patches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.image_pictures import picture_grid, save_picture
from megatron.data.images import ImageHeader, image, open_images, read_image_header
from megatron.data.indexed import DataError
from megatron.data.patch_form import blank, cut_patches, patch_order

COLUMNS = 6  # images in a row of the grid


def inspect_images(options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines to print; also writes the picture. Raises DataError, OSError."""
    for name in ("vocab_file", "show_mask", "labels", "seq_length", "histogram"):
        if getattr(options, name):
            raise DataError(f"--{name.replace('_', '-')} is for text, and {options.prefix} holds images")
    file, info = open_images(options.prefix)
    yield from header_lines(options.prefix, read_image_header(options.prefix))
    chosen = options.document
    if chosen is None:
        count = min(options.samples, len(file))
        chosen = np.random.RandomState(options.seed).choice(len(file), count, replace=False).tolist()
    for number in chosen:
        if not 0 <= number < len(file):
            raise DataError(f"--document {number}: {options.prefix} has images 0 to {len(file) - 1}")
    images = [image(file, info, number) for number in chosen]
    size = options.patch_size
    if size is not None:
        if size < 1 or info.height % size or info.width % size:
            raise DataError(f"--patch-size {size} does not divide {info.height} x {info.width} pixels")
        rows, columns = info.height // size, info.width // size
        empty = [int(blank(cut_patches(one, size, options.order)).sum()) for one in images]
        yield (
            f"{rows * columns} patches of {size} x {size} in {options.order} order; seq_length is "
            f"{rows * columns - 1}, or {rows * columns} with sequence_parallel. Blank patches of the images shown: "
            f"{sum(empty)}"
        )
        yield from order_table(options.order, rows, columns)
    if options.grid is not None and images:
        shown = [with_lines(one, size) for one in images]
        save_picture(options.grid, picture_grid([shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)]))
        yield f"images {', '.join(map(str, chosen))} drawn to {options.grid}"


def header_lines(prefix: str, header: ImageHeader) -> Iterator[str]:
    info = header.images
    values = info.height * info.width * len(info.bands)
    nbytes = values * np.dtype(info.dtype).itemsize * header.documents
    yield (
        f"{prefix}: {header.documents:,} images of {info.height} x {info.width} pixels, {len(info.bands)} bands "
        f"({', '.join(info.bands)}) as {info.dtype}, {nbytes / 1e6:.1f} MB"
    )
    for band, mean, std in zip(info.bands, info.mean, info.std, strict=True):
        yield f"  {band}: mean {mean:.6g}, standard deviation {std:.6g}"
    yield f"left out at the import: {', '.join(f'{n:,} {rule}' for rule, n in header.left_out.items()) or 'none'}"
    if header.properties is not None:
        yield f"properties: {', '.join(property_names(Path(prefix).parent / header.properties))}"


def property_names(path: Path) -> list[str]:
    """Columns of the Parquet file of properties; DataError if it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path}: the properties of the images cannot be read: {error}") from error


def order_table(order: str, rows: int, columns: int, most: int = 16) -> Iterator[str]:
    """Each patch's place in the sequence, laid out as in the image; nothing for a grid wider than `most`."""
    if max(rows, columns) > most:
        return
    places = np.empty(rows * columns, int)
    places[patch_order(order, rows, columns)] = np.arange(rows * columns)
    for row in places.reshape(rows, columns):
        yield " ".join(f"{place:>3}" for place in row)


def with_lines(one: NDArray[Any], size: int | None) -> NDArray[Any]:
    """The image, enlarged, with lines of NaN between its patches."""
    if size is None:
        return one
    factor = max(1, 128 // max(one.shape[:2]))
    large = one.astype(np.float32).repeat(factor, axis=0).repeat(factor, axis=1)
    for edge in range(size * factor, large.shape[0], size * factor):
        large[edge] = np.nan
    for edge in range(size * factor, large.shape[1], size * factor):
        large[:, edge] = np.nan
    return large
