"""Capabilities of this machine's CPU, determined without torch."""

from __future__ import annotations

from pathlib import Path


def native_bf16_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has bf16 matrix or dot-product instructions (x86: AMX or AVX-512 BF16; Arm: bf16)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags.split()))
    return False
