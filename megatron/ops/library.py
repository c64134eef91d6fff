"""Chooses between the compiled kernels and the PyTorch references, and says once which and why.

`auto`: on a GPU the kernels if the library is there, was built for this GPU and passed its self-test; references
otherwise, and always on the CPU. `reference`: references. `required`: kernels or an error; on the CPU that means the
host emulator, which is slow and there for tests.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron.common.errors import UserError
from megatron.ops.build import LIBRARY_NAME, BuildError, Target, cached_library, default_target

logger = logging.getLogger(__name__)

MODES = ("auto", "reference", "required")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKAGED_LIBRARY = Path(__file__).parent / LIBRARY_NAME


class KernelsUnavailable(UserError, RuntimeError):
    """`kernels: required` cannot be satisfied; the message says why and what to do."""


@dataclass
class _State:
    mode: str = "auto"
    verdicts: dict[str, str | None] = field(default_factory=dict)  # device type -> why not, None for "use kernels"
    libraries: dict[str, ctypes.CDLL] = field(default_factory=dict)  # device type -> loaded library
    said: set[str] = field(default_factory=set)


_state = _State()


def configure(mode: str, device: str | torch.device = "cpu") -> str:
    """Set the mode for this process; a sentence for the log about what `device` will use.

    Raises ValueError for an unknown mode and KernelsUnavailable if kernels are required and cannot be had.
    """
    if mode not in MODES:
        raise ValueError(f"kernels: {mode!r} is not one of {', '.join(MODES)}")
    _state.mode = mode
    _state.verdicts.clear()
    kind = torch.device(device).type
    why_not = _verdict(kind)
    if why_not is None:
        return f"fused ops on {kind}: compiled kernels ({architectures(kind)})"
    return f"fused ops on {kind}: PyTorch references ({why_not})"


def use_kernels(op: str, *tensors: Tensor) -> bool:
    """Whether `op` runs as a kernel on these tensors; KernelsUnavailable where `required` forbids the answer no."""
    why_not = _verdict(tensors[0].device.type)
    if why_not is None:
        dtype = tensors[0].dtype
        if dtype in KERNEL_DTYPES and all(t.dtype == dtype for t in tensors):
            return True
        why_not = f"no kernel for {', '.join(str(t.dtype) for t in tensors)}"
        if _state.mode == "required":
            raise KernelsUnavailable(f"{op}: {why_not}; use one of bf16, fp16, fp32 throughout, or kernels: auto")
        if why_not not in _state.said:
            _state.said.add(why_not)
            logger.warning("%s: PyTorch reference (%s)", op, why_not)
    return False


def architectures(kind: str) -> str:
    """What the library loaded for a device type was built for."""
    text = _state.libraries[kind].neox_architectures
    text.restype = ctypes.c_char_p
    return str(text().decode())


def set_emulated_wave(lanes: int) -> None:
    """Wave size, 32 or 64, of the emulator's next launches."""
    if load_library("cpu").neox_emulator_set_wave(lanes):
        raise ValueError(f"the emulator has waves of 32 and 64 lanes, not {lanes}")


def load_library(kind: str) -> ctypes.CDLL:
    """Load the kernels for a device type, once; KernelsUnavailable with the reason if there are none.

    The emulator is built when it is first asked for. GPU libraries are built ahead of time by setup.py; with
    NEOX_JIT_KERNELS=1 a missing one is built at first use.
    """
    if kind not in _state.libraries:
        try:
            if kind == "cpu":
                path = cached_library(Target("emulator"))
            elif PACKAGED_LIBRARY.exists():
                path = PACKAGED_LIBRARY
            else:
                target = default_target() if os.environ.get("NEOX_JIT_KERNELS") == "1" else None
                if target is None:
                    raise KernelsUnavailable(
                        "no kernel library is installed; build it with `python setup.py build_ext --inplace`"
                    )
                path = cached_library(target)
            torch.ops.load_library(str(path))
            _state.libraries[kind] = ctypes.CDLL(str(path))
        except (BuildError, OSError) as error:
            raise KernelsUnavailable(str(error)) from error
    return _state.libraries[kind]


def _verdict(kind: str) -> str | None:
    if kind not in _state.verdicts:
        _state.verdicts[kind] = _decide(kind)
    return _state.verdicts[kind]


def _decide(kind: str) -> str | None:
    if _state.mode == "reference":
        return "asked for"
    if kind not in ("cuda", "cpu"):
        return f"there are no kernels for {kind}"
    if kind == "cpu" and _state.mode == "auto":
        return "the CPU has no kernels"
    try:
        load_library(kind)
        if kind == "cuda":
            _check_device()
    except KernelsUnavailable as error:
        if _state.mode == "required":
            raise
        return str(error)
    return None


def _check_device() -> None:
    """KernelsUnavailable unless the library was built for the current GPU and its self-test passes there."""
    from megatron.ops.selftest import failures

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else ""
    name = name or f"sm_{properties.major}{properties.minor}"
    built = architectures("cuda")
    if name not in built.split(","):
        raise KernelsUnavailable(f"this GPU is {name}, the kernels are for {built}; set NEOX_GPU_ARCHS and rebuild")
    failed = failures(torch.device("cuda"))
    if failed:
        raise KernelsUnavailable(f"the kernels failed their self-test on this GPU: {'; '.join(failed)}")
