"""Settings and counters of the kernels' host emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron.ops.library import load_library


def set_emulated_wave(lanes: int) -> None:
    """Set the wave size, 32 or 64, of the emulator's next launches; builds and loads the emulator if necessary."""
    if load_library("cpu").neox_emulator_set_wave(lanes):
        raise ValueError(f"the emulator has waves of 32 and 64 lanes, not {lanes}")


@contextmanager
def compute_units(number: int) -> Iterator[None]:
    """Set the compute units of the emulated device; on exit they are an MI250X GCD's 110 again."""
    library = load_library("cpu")
    if library.neox_emulator_set_compute_units(number):
        raise ValueError(f"the emulator has at least one compute unit, not {number}")
    try:
        yield
    finally:
        library.neox_emulator_set_compute_units(110)


def launches(function: Callable[[], object]) -> int:
    """How many kernels `function` launches on the emulator."""
    count = load_library("cpu").neox_emulator_launches
    before = count()
    function()
    return int(count() - before)
