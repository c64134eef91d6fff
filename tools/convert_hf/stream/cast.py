"""An explicit change of type, band by band: the only step of a plain conversion that needs torch."""

from __future__ import annotations

import torch

from ..errors import ConvertError

_CHECKED = 1 << 17  # elements checked at a time: the check needs several copies of them


def cast_band(band: memoryview, source: str, target: str, name: str) -> memoryview:
    """Convert the elements of `band`, rounding to nearest even; ConvertError if a finite value overflows."""
    values = torch.frombuffer(band, dtype=getattr(torch, source))
    out = bytearray(values.numel() * getattr(torch, target).itemsize)
    result = torch.frombuffer(out, dtype=getattr(torch, target)).copy_(values)
    if torch.finfo(result.dtype).max < torch.finfo(values.dtype).max:
        for after, before in zip(result.split(_CHECKED), values.split(_CHECKED), strict=True):
            if not torch.equal(torch.isfinite(after), torch.isfinite(before)):
                raise ConvertError(f"{name} has values that are too large for {target}; choose bfloat16 or float32")
    return memoryview(out)
