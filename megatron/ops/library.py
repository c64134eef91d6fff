"""The compiled kernel library of each device type, and whether an operation runs on it or as its PyTorch reference.

`megatron.ops.choose` decides once per process and device type; this module stores the decision and looks it up.
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

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKAGED_LIBRARY = Path(__file__).parent / LIBRARY_NAME


class KernelsUnavailable(UserError, RuntimeError):
    """`kernels: required` cannot be satisfied; the message says why and what to do."""


@dataclass
class LibraryState:
    required: bool = False
    reasons: dict[str, str | None] = field(default_factory=dict)  # device type -> why references run, None for kernels
    libraries: dict[str, ctypes.CDLL] = field(default_factory=dict)  # device type -> loaded library
    warned: set[str] = field(default_factory=set)


state = LibraryState()


def record_choice(kind: str, why_not: str | None, required: bool) -> None:
    """Store the choice for one device type: kernels if `why_not` is None, else references, for that reason.

    It replaces every earlier choice. With `required`, `use_kernels` raises where it would fall back to a reference.
    """
    state.required = required
    state.reasons = {kind: why_not}


def use_kernels(op: str, *tensors: Tensor) -> bool:
    """Whether `op` runs as a kernel on these tensors.

    Raises KernelsUnavailable if kernels are required and there is none for these tensors. On a device type without a
    choice the references run, with a warning unless it is the CPU.
    """
    kind = tensors[0].device.type
    if kind in state.reasons:
        if state.reasons[kind] is not None:
            return False
        dtype = tensors[0].dtype
        if dtype in KERNEL_DTYPES and all(t.dtype == dtype for t in tensors):
            return True
        why_not = f"no kernel for {', '.join(str(t.dtype) for t in tensors)}"
        advice = "use one of bf16, fp16, fp32 throughout, or kernels: auto"
    elif kind == "cpu" and not state.required:
        return False
    else:
        why_not, advice = f"nothing was chosen for {kind}", "call megatron.ops.configure first"
    if state.required:
        raise KernelsUnavailable(f"{op}: {why_not}; {advice}")
    if why_not not in state.warned:
        state.warned.add(why_not)
        logger.warning("%s: PyTorch reference (%s)", op, why_not)
    return False


def architectures(kind: str) -> list[str]:
    """Architectures that the library loaded for a device type was built for."""
    text = state.libraries[kind].neox_architectures
    text.restype = ctypes.c_char_p
    return str(text().decode()).split("+")


def load_library(kind: str) -> ctypes.CDLL:
    """Load the kernels for a device type, once. Raises KernelsUnavailable with the reason if there are none.

    The emulator is built at first use. GPU libraries are built ahead of time by setup.py; with NEOX_JIT_KERNELS=1 a
    missing one is built at first use.
    """
    if kind not in state.libraries:
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
            state.libraries[kind] = ctypes.CDLL(str(path))
        except (BuildError, OSError) as error:
            raise KernelsUnavailable(str(error)) from error
    return state.libraries[kind]
