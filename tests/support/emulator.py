"""Settings of the kernels' host emulator."""

from __future__ import annotations

from megatron.ops.library import load_library


def set_emulated_wave(lanes: int) -> None:
    """Wave size, 32 or 64, of the emulator's next launches; builds and loads the emulator if need be."""
    if load_library("cpu").neox_emulator_set_wave(lanes):
        raise ValueError(f"the emulator has waves of 32 and 64 lanes, not {lanes}")
