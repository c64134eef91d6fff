"""Rotary position embedding (Su et al. 2021) with Llama-3.1's frequency scaling.

Frequencies, angles and tables stay fp32: they are plain attributes of a `RotaryTable`, not parameters or buffers, so
that no `.to(bfloat16)` reaches them. In bf16 the angle at position 8191 would be off by up to 16 rad.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the converter uses these frequencies where pydantic is not installed
    from megatron.neox_arguments.keys.model import RopeScaling


def inverse_frequencies(dim: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """Inverse frequencies [dim / 2] in fp32, bit-equal to the Hugging Face llama3 rule.

    Frequencies of long wavelengths (above original context / `low_freq_factor`) are divided by `factor`, those of short
    ones (below original context / `high_freq_factor`) kept, those between interpolated. Source: Llama-3.1 release,
    `apply_scaling`; the attention factor is 1.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / dim
    inv_freq = 1.0 / (base**exponents)
    if scaling is None:
        return inv_freq
    context, factor = scaling.original_max_position_embeddings, scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, blended, scaled)


class RotaryTable:
    """cos and sin of every position's angles, fp32 [max_positions, dim / 2], one copy per device."""

    def __init__(self, dim: int, base: float, scaling: RopeScaling | None, max_positions: int) -> None:
        self.inv_freq = inverse_frequencies(dim, base, scaling)
        self.max_positions = max_positions
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin) on a device; computed on the host, so that all devices hold the same bits."""
        if device not in self._tables:
            positions = torch.arange(self.max_positions, dtype=torch.float32, device="cpu")
            angles = torch.outer(positions, self.inv_freq)
            self._tables[device] = (angles.cos().to(device), angles.sin().to(device))
        return self._tables[device]
