"""Sources of images: loose files, NumPy archives, Parquet shards; with the properties of each image."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.common.errors import UserError
from megatron.data.indexed import DataError
from tools.datasets.imaging.decode import FITS, PICTURES, ImageBlock, Item

BLOCK_BYTES = 16 << 20  # values of a block; bounds memory for large images
ID = "id"
ARCHIVE = ".npz archive"
Columns = dict[str, Sequence[Any] | NDArray[Any]]


class ImageSourceFiles(Protocol):
    """Images that are read together: `blocks` in row order, and the properties of given rows."""

    @property
    def files(self) -> list[Path]: ...

    def blocks(self, number: int, size: int) -> Iterator[ImageBlock]:
        """All images as blocks of source `number`, `size` images in each block but the last of a file.

        Raises DataError for a file that cannot be read.
        """
        ...

    def properties(self, rows: NDArray[np.int64]) -> Any:
        """A pyarrow table with the column `id` and one row for each of `rows`, which are ascending."""
        ...


def id_column(ids: Iterable[str]) -> Any:
    """Strings as an Arrow array, built from buffers: `pyarrow.array` first imports pandas if it is installed."""
    import pyarrow

    texts = [one.encode() for one in ids]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pyarrow.StringArray.from_buffers(len(texts), pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(texts)))


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file, which may be anything, into DataError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: no readable {kind}: {type(error).__name__}: {error}") from error


def per_block(nbytes: int) -> int:
    """How many images of `nbytes` bytes go into a block."""
    return max(1, min(256, BLOCK_BYTES // max(nbytes, 1)))


@dataclass
class LooseFiles:
    """Pictures and FITS files, one image each; its id is its path below the given folder."""

    files: list[Path]
    ids: list[str]

    def blocks(self, number: int, size: int) -> Iterator[ImageBlock]:
        for start in range(0, len(self.files), size):
            part = self.files[start : start + size]
            yield ImageBlock(number, start, [str(path) for path in part], part)

    def properties(self, rows: NDArray[np.int64]) -> Any:
        import pyarrow

        return pyarrow.table({ID: id_column(self.ids[row] for row in rows.tolist())})


@dataclass
class Archive:
    """An `.npz`: the array `images` [n, ...], and arrays of n values each, which are properties.

    A two-dimensional array gives a property for each of its columns, named as in the array `names`.
    """

    path: Path

    @property
    def files(self) -> list[Path]:
        return [self.path]

    @cached_property
    def _members(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every array, without reading it."""
        found = {}
        with reading(self.path, ARCHIVE), zipfile.ZipFile(self.path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    shape, fortran, dtype = _array_header(file)
                    if member == "images.npy" and fortran:
                        raise DataError(f"{self.path}: images are stored in Fortran order; save them in C order")
                    found[member.removesuffix(".npy")] = (shape, dtype)
        shape = found.get("images", ((), None))[0]
        if len(shape) not in (3, 4):
            raise DataError(
                f"{self.path}: expected an array `images` of n images, [n, height, width] or with bands; it has "
                f"{', '.join(f'{name} {list(size)}' for name, (size, _) in found.items()) or 'nothing'}"
            )
        return found

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self._members["images"][0][1:]

    def blocks(self, number: int, size: int) -> Iterator[ImageBlock]:
        (count, *shape), dtype = self._members["images"]
        nbytes = int(np.prod(shape)) * dtype.itemsize
        with reading(self.path, ARCHIVE), zipfile.ZipFile(self.path) as archive, archive.open("images.npy") as file:
            _array_header(file)
            for start in range(0, count, size):
                rows = min(size, count - start)
                raw = file.read(rows * nbytes)
                if len(raw) < rows * nbytes:
                    raise DataError(f"{self.path}: images end after row {start + len(raw) // nbytes} of {count}")
                images = np.frombuffer(raw, dtype).reshape(rows, *shape)
                yield ImageBlock(number, start, [f"{self.path}:{start + row}" for row in range(rows)], list(images))

    def properties(self, rows: NDArray[np.int64]) -> Any:
        import pyarrow

        count = self._members["images"][0][0]
        columns: Columns = {ID: [f"{self.path.name}:{row}" for row in rows.tolist()]}
        with reading(self.path, ARCHIVE), np.load(self.path, allow_pickle=False) as archive:
            names = archive["names"].tolist() if "names" in archive else []
            for name, (shape, dtype) in self._members.items():
                if name == "images" or not shape or shape[0] != count or len(shape) > 2 or dtype.kind not in "biufU":
                    continue
                values = archive[name][rows]
                if len(shape) == 1:
                    columns[ID if name in (ID, "ids") else name] = values
                    continue
                titles = names if len(names) == shape[1] else [f"{name}_{k}" for k in range(shape[1])]
                columns |= {str(title): values[:, k] for k, title in enumerate(titles)}
        ids = id_column(map(str, columns.pop(ID)))
        return pyarrow.table({ID: ids} | {name: pyarrow.array(values) for name, values in columns.items()})


def _array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, type) of a .npy file that has just been opened."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def find_sources(
    inputs: Sequence[str], shard: Callable[[Path], ImageSourceFiles] | None = None
) -> list[ImageSourceFiles]:
    """Sources of files, globs and folders in the order given, folders sorted by name. Raises DataError.

    `shard` opens a Parquet file.
    """
    from glob import glob

    found: list[ImageSourceFiles] = []
    for entry in inputs:
        paths = [Path(entry)] if Path(entry).exists() else [Path(path) for path in sorted(glob(entry))]
        if not paths:
            raise DataError(f"--input {entry}: no such file or folder, and no glob that matches one")
        for path in paths:
            found += _below(path, shard) if path.is_dir() else [_of(path, None, shard)]
    return _joined(found)


def _below(folder: Path, shard: Callable[[Path], ImageSourceFiles] | None) -> list[ImageSourceFiles]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and _kind(path) is not None)
    if not paths:
        raise DataError(
            f"--input {folder}: no images in it; expected {', '.join((*PICTURES, *FITS, '.npz'))}, .parquet"
        )
    return [_of(path, folder, shard) for path in paths]


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith((*PICTURES, *FITS)):
        return "loose"
    return next((kind for kind in ("npz", "parquet") if name.endswith(f".{kind}")), None)


def _of(path: Path, below: Path | None, shard: Callable[[Path], ImageSourceFiles] | None) -> ImageSourceFiles:
    kind = _kind(path)
    if kind == "parquet" and shard is not None:
        return shard(path)
    if kind == "npz":
        return Archive(path)
    if kind == "loose":
        name = path.relative_to(below) if below is not None else Path(path.name)
        return LooseFiles([path], [_without_ending(name)])
    raise DataError(
        f"--input {path}: unknown kind of image file; expected {', '.join(PICTURES)}, FITS, .npz or .parquet"
    )


def _without_ending(path: Path) -> str:
    text = path.as_posix()
    ending = next(ending for ending in (*PICTURES, *FITS) if text.lower().endswith(ending))
    return text[: -len(ending)]


def _joined(sources: list[ImageSourceFiles]) -> list[ImageSourceFiles]:
    """Join consecutive loose files into one source."""
    result: list[ImageSourceFiles] = []
    for source in sources:
        last = result[-1] if result else None
        if isinstance(source, LooseFiles) and isinstance(last, LooseFiles):
            last.files.extend(source.files)
            last.ids.extend(source.ids)
        else:
            result.append(source)
    return result


def items_of(sources: Sequence[ImageSourceFiles]) -> Iterator[Item]:
    """Every undecoded image of all sources, read one at a time."""
    for number, source in enumerate(sources):
        for block in source.blocks(number, 1):
            yield from block.items
