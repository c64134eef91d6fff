"""Meta's own checkpoints: `consolidated.*.pth` with `params.json` (placeholder until its reader is written)."""

from __future__ import annotations

from pathlib import Path

from tools.convert_hf.errors import ConvertError
from tools.convert_hf.opening import Checkpoint, Options


def recognises(path: Path, names: list[str]) -> bool:
    return "params.json" in names and any(n.startswith("consolidated.") for n in names)


def open_folder(path: Path, names: list[str], options: Options) -> Checkpoint:
    raise ConvertError(f"{path}: Meta's format is not read yet")
