"""Indices kept next to the data: built once, by one process, and only read afterwards.

An index is a few arrays in a folder whose name has a hash of the data and of every setting that determines them. So a
stale index is never found, and an index that is found is complete: it was written under another name and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.header import fingerprint
from megatron.data.indexed import DataError

CACHE_FOLDER = "index_cache"
VERSION = 1  # part of every key: increment it when the same settings come to mean other arrays
Arrays = dict[str, NDArray[Any]]


class CachedIndex:
    """The arrays that `build` returns, mapped from disk.

    If the data's folder cannot be written to, every process builds its own and keeps it in memory.
    """

    def __init__(self, prefix: str, label: str, identity: Mapping[str, object], build: Callable[[], Arrays]) -> None:
        """`label` is a readable part of the name; `identity` is everything besides the data that determines the arrays.

        Builds the index if it is absent. Raises DataError, naming the file, if it is damaged.

        Builds the index if it is not there. Raises DataError, naming the file, if it is there and damaged.
        """
        text = json.dumps({**identity, "data": fingerprint(prefix)["hash"], "version": VERSION}, sort_keys=True)
        path = Path(prefix)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = path.parent / CACHE_FOLDER / f"{path.name}_{label}_{key}"
        self._in_memory: Arrays | None = None
        if not self.folder.is_dir() and not _build_once(self.folder, build):
            self._in_memory = build()
        self.arrays()

    def arrays(self) -> Arrays:
        """The arrays by name. Few folders stay open at a time, so that a blend of many sources needs few handles."""
        return open_arrays(self.folder) if self._in_memory is None else self._in_memory


@lru_cache(maxsize=64)
def open_arrays(folder: Path) -> Arrays:
    arrays = {}
    try:
        for name in json.loads((folder / "arrays.json").read_text()):
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{folder}: damaged index ({error}); remove this folder and run again, or run "
            f"tools/datasets/build_indices.py"
        ) from error
    return arrays


def _build_once(folder: Path, build: Callable[[], Arrays]) -> bool:
    """Build the index in the first of the processes that call this. False if the data's folder cannot be written to."""
    try:
        folder.parent.mkdir(exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                _write(build(), folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"{folder}: no index is kept ({error.strerror}); every rank builds its own", file=sys.stderr)
        return False
    return True


def _write(arrays: Arrays, folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array, allow_pickle=False)
        (aside / "arrays.json").write_text(json.dumps(list(arrays)))
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not folder.is_dir():  # where locks do not work, another process may have been first: its index is the same
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which ends with the process. File systems without locks cost double work only."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
