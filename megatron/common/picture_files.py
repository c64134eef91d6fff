"""Checks that a command can write its picture, before it does the work."""

from __future__ import annotations

from pathlib import Path

from megatron.common.errors import UserError

ENDINGS = (".png", ".svg", ".pdf")


def check_picture_file(path: Path, error: type[UserError]) -> None:
    """Raise `error` if matplotlib is missing, or cannot write a picture to `path`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise error("--picture needs matplotlib; pip install matplotlib, or leave --picture out") from None
    if path.suffix not in ENDINGS:
        raise error(f"--picture: {path} must end in one of {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise error(f"--picture: there is no folder {path.absolute().parent}")
