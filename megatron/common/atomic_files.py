"""Writes that survive a power failure: data synced before the name appears, folders synced after. Standard library
only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (created, renamed and removed names) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a closed file's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a new version of `path`: yields the path of a temporary file in the same folder for the body to write.

    When the body ends, `path` is atomically replaced by that file: readers see either the old content or all of the new
    one, even after a crash. If it raises, the temporary file is removed and `path` is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step, as `replacing` does."""
    write_bytes(path, text.encode())
