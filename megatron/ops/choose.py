"""Chooses between the compiled kernels and the PyTorch references, and describes the choice for the log.

`auto`: on a GPU the kernels, if the library is installed, was built for this GPU and passes its self-test; references
otherwise, and always on the CPU. `reference`: references. `required`: kernels or an error; on the CPU that means the
host emulator, which is slow and meant for tests.
"""

from __future__ import annotations

import torch

from megatron.ops import library
from megatron.ops.kernel_checks import failed_checks
from megatron.ops.library import KernelsUnavailable

MODES = ("auto", "reference", "required")


def configure(mode: str, device: str | torch.device = "cpu") -> str:
    """Choose for this process and the type of `device`; returns a sentence for the log.

    Raises ValueError for an unknown mode, and KernelsUnavailable if kernels are required but unavailable.
    """
    if mode not in MODES:
        raise ValueError(f"kernels: {mode!r} is not one of {', '.join(MODES)}")
    kind = torch.device(device).type
    why_not = _why_references(mode, kind)
    library.record_choice(kind, why_not, required=mode == "required")
    if why_not is None:
        return f"fused ops on {kind}: compiled kernels ({', '.join(library.architectures(kind))})"
    return f"fused ops on {kind}: PyTorch references ({why_not})"


def _why_references(mode: str, kind: str) -> str | None:
    """The reason why a device type runs the references; None if it runs kernels."""
    if mode == "reference":
        return "asked for"
    if kind not in ("cuda", "cpu"):
        return f"there are no kernels for {kind}"
    if kind == "cpu" and mode == "auto":
        return "the CPU has no kernels"
    try:
        library.load_library(kind)
        if kind == "cuda":
            _check_device()
    except KernelsUnavailable as error:
        if mode == "required":
            raise
        return str(error)
    return None


def _check_device() -> None:
    """Raise KernelsUnavailable unless the library was built for the current GPU and passes its self-test there."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else ""
    name = name or f"sm_{properties.major}{properties.minor}"
    built = library.architectures("cuda")
    if name not in built:
        raise KernelsUnavailable(
            f"this GPU is {name}, the kernels are for {', '.join(built)}; set NEOX_GPU_ARCHS and rebuild"
        )
    failed = failed_checks(torch.device("cuda"))
    if failed:
        raise KernelsUnavailable(f"the kernels failed their self-test on this GPU: {'; '.join(failed)}")
