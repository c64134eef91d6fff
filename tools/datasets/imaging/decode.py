"""Decodes one image from a file, bytes or an array to [height, width, bands]; this part runs in every worker."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron.common.errors import UserError
from megatron.data.indexed import DataError

PICTURES = (".png", ".jpg", ".jpeg")
PIXELS = 1 << 18  # pixels summed at once; a multiple of 256
FITS = (".fits", ".fit", ".fits.gz", ".fits.fz")
Item = Path | bytes | NDArray[Any]
"""An image before decoding: a file, the bytes of a picture, or its values."""

Axes = Literal["hwc", "chw"]


class ImageError(UserError, ValueError):
    """An image that cannot be used; `rule` is the reason in a few words, for counting."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule


def read_image(item: Item, axes: Axes = "hwc") -> NDArray[Any]:
    """Decode an image to [height, width, bands], uint8 or float32; `axes` are those of an array. Raises ImageError."""
    if isinstance(item, np.ndarray):
        return _typed(_with_bands(item, axes))
    if isinstance(item, Path) and item.name.lower().endswith(FITS):
        return _typed(_with_bands(_fits(item), "chw"))
    return _typed(_with_bands(_picture(item), "hwc"))


def require(package: str, what: str) -> None:
    """Raise DataError unless a package of the extra `images` is installed."""
    if importlib.util.find_spec(package) is None:
        raise DataError(f"{what} needs the package {package}, which is not installed: pip install .[images]")


def _picture(item: Path | bytes) -> NDArray[Any]:
    require("PIL", "reading pictures")
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(item if isinstance(item, Path) else io.BytesIO(item)) as picture:
            if picture.mode not in ("L", "RGB", "P", "I;16", "I;16B", "F"):
                raise ImageError(f"mode {picture.mode}", "expected gray, RGB or 16-bit gray values")
            return np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    except ImageError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageError("unreadable picture", str(error)) from error


def _fits(path: Path) -> NDArray[Any]:
    """The planes of the first image of a FITS file: [height, width] or [planes, height, width]."""
    require("astropy", "reading FITS files")
    from astropy.io import fits

    try:
        with fits.open(path, memmap=False) as units:
            for unit in units:
                if unit.data is not None and getattr(unit, "is_image", False):
                    return np.asarray(unit.data)
    except Exception as error:  # astropy fails on damaged files with any error: AttributeError and zlib.error were seen
        raise ImageError("unreadable FITS file", f"{type(error).__name__}: {error}") from error
    raise ImageError("FITS file without an image", "expected 1 or more planes")


def _with_bands(values: NDArray[Any], axes: Axes) -> NDArray[Any]:
    if values.ndim == 2:
        return values[..., None]
    if values.ndim != 3 or 0 in values.shape:
        raise ImageError("no image", f"an array of shape {list(values.shape)}; expected two dimensions, or three")
    return values.transpose(1, 2, 0) if axes == "chw" else values


def _typed(values: NDArray[Any]) -> NDArray[Any]:
    """uint8 is kept, other numbers become native float32."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "iuf":
        raise ImageError(f"values of type {values.dtype}", "expected numbers")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


@dataclass
class BandMoments:
    """Count, mean and sum of squared deviations of each band's values."""

    count: list[int]
    mean: list[float]
    squares: list[float]

    @classmethod
    def of(cls, image: NDArray[Any]) -> BandMoments:
        """Moments of an image [height, width, bands], without its NaN."""
        values = image.reshape(-1, image.shape[-1])
        if values.dtype == np.uint8:
            return cls._of_bytes(values)
        known = [band[~np.isnan(band)].astype(np.float64) for band in values.T]
        means = [float(band.mean()) if len(band) else 0.0 for band in known]
        squares = [float(((band - mean) ** 2).sum()) for band, mean in zip(known, means, strict=True)]
        return cls([len(band) for band in known], means, squares)

    @classmethod
    def _of_bytes(cls, values: NDArray[np.uint8]) -> BandMoments:
        """Moments of [pixels, bands], in fp32 for speed; exact, because 256 squared bytes sum to less than 2**24."""
        pixels, bands = values.shape
        whole = pixels - pixels % 256
        parts = [values[start : min(start + PIXELS, whole)].reshape(256, -1) for start in range(0, whole, PIXELS)]
        total, squares = np.zeros(bands), np.zeros(bands)
        for part in (*parts, values[whole:]):
            numbers = part.astype(np.float32)
            total += numbers.sum(axis=0).reshape(-1, bands).sum(axis=0, dtype=np.float64)
            squares += np.einsum("ij,ij->j", numbers, numbers).reshape(-1, bands).sum(axis=0, dtype=np.float64)
        sums = [(int(one), int(two)) for one, two in zip(total, squares, strict=True)]
        return cls(
            [pixels] * bands, [one / pixels for one, _ in sums], [(pixels * two - one**2) / pixels for one, two in sums]
        )

    def joined(self, other: BandMoments) -> BandMoments:
        """The moments of both sets of values together (Chan et al. 1983)."""
        if not self.count:
            return other
        result = BandMoments([], [], [])
        for band, (n, m) in enumerate(zip(self.count, other.count, strict=True)):
            total, difference = n + m, other.mean[band] - self.mean[band]
            share = m / total if total else 0.0
            result.count.append(total)
            result.mean.append(self.mean[band] + difference * share)
            result.squares.append(self.squares[band] + other.squares[band] + difference**2 * n * share)
        return result

    def std(self) -> list[float]:
        return [(squares / max(count, 1)) ** 0.5 for count, squares in zip(self.count, self.squares, strict=True)]


@dataclass(frozen=True)
class ImageBlock:
    """Consecutive images of one source: `first` is the row of the first image, `items` are to be decoded."""

    source: int
    first: int
    names: list[str]
    items: Sequence[Item]


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes images in a worker, and checks that they have the required shape and type."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    crop: int | None
    axes: Axes
    keeps_nan: bool

    @classmethod
    def like(cls, first: NDArray[Any], crop: int | None, axes: Axes, keeps_nan: bool) -> ImageDecoder:
        """A decoder that requires all images to be like `first`."""
        cut = cropped(first, crop)
        return cls((cut.shape[0], cut.shape[1], cut.shape[2]), cut.dtype, crop, axes, keeps_nan)

    def usable(self, block: ImageBlock, bad: list[tuple[str, str]]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (place in the block, image) of usable images; (rule, message) of the others are appended to `bad`."""
        for place, (name, item) in enumerate(zip(block.names, block.items, strict=True)):
            try:
                image = self._checked(item)
            except ImageError as error:
                bad.append((error.rule, f"{name}: {error}"))
            else:
                yield place, image

    def _checked(self, item: Item) -> NDArray[Any]:
        image = cropped(read_image(item, self.axes), self.crop)
        if image.dtype != self.dtype:
            raise ImageError(f"values of type {image.dtype}", f"the first image has {self.dtype}")
        if image.shape != self.shape:
            raise ImageError("another shape", f"{_text(image.shape)} where the first image has {_text(self.shape)}")
        if image.dtype == np.float32:
            if np.isinf(image).any():
                raise ImageError("infinite values", "no picture has them")
            if not self.keeps_nan and np.isnan(image).any():
                raise ImageError("NaN", "--nan mask keeps such images and leaves their patches with NaN unlearned")
        return np.ascontiguousarray(image)


def cropped(image: NDArray[Any], side: int | None) -> NDArray[Any]:
    """The central `side` x `side` pixels of an image. Raises ImageError if it is smaller."""
    if side is None:
        return image
    height, width, _ = image.shape
    if min(height, width) < side:
        raise ImageError("smaller than --crop", f"{height} x {width} pixels")
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def refuse_swapped_axes(shape: tuple[int, ...]) -> None:
    """Raise DataError for a shape [bands, height, width] that was given as [height, width, bands]."""
    if len(shape) == 3 and shape[2] > 16 >= shape[0]:
        raise DataError(
            f"arrays of shape {list(shape)} look like bands x height x width; give --axes chw (or --axes hwc, if the "
            f"images really have {shape[2]} bands)"
        )
