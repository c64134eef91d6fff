"""Images in a `.bin/.idx` pair: one document is one image, its height x width x bands values in raster order.

So a run chooses its own patch size and order. Values are uint8, or float32, where NaN means that nothing was measured.
All images of a pair have one shape, recorded in the header beside the index, `{prefix}.json`. What is known of each
image (its id, properties to be probed) is in the Parquet file that the header names, one row per image.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron.data.header import header_path
from megatron.data.indexed import DataError, IndexedFile, open_indexed

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs

IMPORTER = "tools/datasets/preprocess_images.py"


class ImageInfo(BaseModel):
    """What all images of a pair have in common, and the mean and standard deviation of each band over all of them."""

    model_config = ConfigDict(extra="forbid")
    height: int
    width: int
    bands: list[str]
    dtype: str  # uint8 or float32
    mean: list[float]
    std: list[float]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, len(self.bands)


class ImageHeader(BaseModel):
    """What the importer records about its output."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    images: ImageInfo
    documents: int
    crc32: str  # of the .bin, hexadecimal
    sources: list[str]
    left_out: dict[str, int] = {}  # images that are not in the data, by reason
    bad_images: list[str] = []  # the first of them, with the reason
    properties: str | None = None  # the Parquet file beside the header, with a row for each image

    @property
    def skipped(self) -> int:
        """Images that were left out."""
        return sum(self.left_out.values())


def read_image_header(prefix: str | Path) -> ImageHeader:
    """The header of a pair that holds images. Raises DataError if there is none, or if it describes text."""
    path = header_path(prefix)
    try:
        return ImageHeader.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, and only it says what shape the images have; use {IMPORTER}") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no header of images; make them with {IMPORTER}: {error}") from error


def open_images(prefix: str) -> tuple[IndexedFile, ImageInfo]:
    """A pair of images and their shape, checked against each other. DataError if they do not belong together."""
    file, header = open_indexed(prefix), read_image_header(prefix)
    images = header.images
    values = images.height * images.width * len(images.bands)
    if file.dtype != np.dtype(images.dtype) or len(file) != header.documents or file.num_tokens != values * len(file):
        raise DataError(
            f"{header_path(prefix)}: promises {header.documents} images of {_text(images)}, the index has {len(file)} "
            f"documents and {file.num_tokens} values as {file.dtype}; the header belongs to other data, import again"
        )
    return file, images


def image(file: IndexedFile, info: ImageInfo, number: int) -> NDArray[Any]:
    """Image `number`, [height, width, bands], a view of the mapped file."""
    return file.document(number).reshape(info.shape)


def check_images(prefix: str, args: NeoXArgs, with_length: bool = True) -> None:
    """Raise DataError unless the images are those that the configuration describes, `seq_length` included."""
    patches = args.patches
    assert patches is not None  # of a run that reads images
    _, info = open_images(prefix)
    name = header_path(prefix)
    if len(info.bands) != patches.channels:
        raise DataError(
            f"{name}: the images have {len(info.bands)} bands ({', '.join(info.bands)}), patches.channels is "
            f"{patches.channels}"
        )
    if info.height % patches.size or info.width % patches.size:
        raise DataError(
            f"{name}: images of {info.height} x {info.width} pixels cannot be cut into patches of {patches.size} x "
            f"{patches.size}; change patches.size, or import with --crop"
        )
    count = (info.height // patches.size) * (info.width // patches.size)
    if with_length and args.seq_length not in (count - 1, count):
        raise DataError(
            f"{name}: images of {info.height} x {info.width} pixels are {count} patches of {patches.size} x "
            f"{patches.size}, seq_length is {args.seq_length}; write seq_length: {count - 1} (or {count}, which reads "
            f"the last patch as well and learns nothing from it: for sequence_parallel, which needs an even length)"
        )


def _text(info: ImageInfo) -> str:
    return f"{info.height} x {info.width} x {len(info.bands)} ({info.dtype})"
