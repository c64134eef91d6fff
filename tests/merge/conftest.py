"""Merge tests write small folders and sync them; in a memory file system, if available, syncing is free."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.merges import write_parents

_MEMORY = "/dev/shm"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """base, a, b and an adapter of base."""
    write_parents(tmp_path)
    return tmp_path
