"""The only arithmetic of the converter: an explicit change of type, band by band. This is where torch is needed."""

from __future__ import annotations

import torch

from tools.convert_hf.errors import ConvertError


def cast_band(band: memoryview, source: str, target: str, name: str) -> memoryview:
    """The elements of `band` in another type, rounded to nearest even; ConvertError if a finite value overflows."""
    values = torch.frombuffer(band, dtype=getattr(torch, source))
    out = bytearray(values.numel() * getattr(torch, target).itemsize)
    result = torch.frombuffer(out, dtype=getattr(torch, target)).copy_(values)
    if not torch.equal(torch.isfinite(result), torch.isfinite(values)):
        raise ConvertError(f"{name} has values that are too large for {target}; choose bfloat16 or float32")
    return memoryview(out)
