"""Checkpoints: complete or absent, every tensor accounted for, opened without running code.

You are here: neox_arguments -> launcher -> model -> trainer -> **checkpoint**. `docs/checkpoints.md` describes the
files. The names below are imported when they are first used, so that `manifest` and `folders` stay free of torch for
tools on a login node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.checkpoint.background import BackgroundSaver
    from megatron.checkpoint.load import load_checkpoint
    from megatron.checkpoint.save import prepare_save, save_checkpoint
    from megatron.checkpoint.state import TrainState

_HOME = {
    "BackgroundSaver": "background",
    "load_checkpoint": "load",
    "prepare_save": "save",
    "save_checkpoint": "save",
    "TrainState": "state",
}
__all__ = ["BackgroundSaver", "TrainState", "load_checkpoint", "prepare_save", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
