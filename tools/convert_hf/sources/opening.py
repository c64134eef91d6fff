"""Open a checkpoint of any supported kind. A new kind needs a `CheckpointSource` and an entry in `SOURCES`."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConvertError
from .checkpoint import Checkpoint, CheckpointSource, OpenOptions
from .hf import HuggingFaceFolder
from .meta import MetaFolder
from .neox import NeoxFolder

SOURCES: tuple[CheckpointSource, ...] = (HuggingFaceFolder(), MetaFolder(), NeoxFolder())


def open_checkpoint(path: Path, options: OpenOptions | None = None) -> Checkpoint:
    """Recognize and open a checkpoint folder; ConvertError states what is missing or wrong."""
    options = options or OpenOptions()
    try:
        if not path.is_dir():
            raise ConvertError(f"{path} is not a folder; give the folder that holds the checkpoint")
        names = sorted(os.listdir(path))
        for source in SOURCES:
            if source.recognizes(path, names):
                return source.open(path, names, options)
    except OSError as error:
        raise ConvertError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
    *others, last = [source.expected for source in SOURCES]
    raise ConvertError(
        f"{path} holds no checkpoint of a known kind: expected {', '.join(others)}, or {last} "
        f"(perhaps one folder up or down)"
    )
