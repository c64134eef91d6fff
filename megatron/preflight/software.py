"""The software of a rank: names and versions of what is installed, without importing it; and ranks that differ."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from megatron.preflight.diagnosis import Roster

_PACKAGES = {"DeepSpeed": "deepspeed", "megatron-core": "megatron-core"}
_PLUGINS = ("librccl-net.so", "libnccl-net.so")  # RCCL looks for both on the loader's path


def installed_software(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Names and versions of the software that a training uses, "none" if not installed."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    if torch.version.hip is not None:
        found["ROCm"] = torch.version.hip
    elif torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        name = "RCCL" if torch.version.hip is not None else "NCCL"
        found[name] = ".".join(map(str, torch.cuda.nccl.version()))
        found["network plugin"] = network_plugin(environment)
    for name, package in _PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    found["apex"] = apex_kind()
    return found


def network_plugin(environment: Mapping[str, str]) -> str:
    """Path of the plugin through which RCCL reaches the fast network, by the loader's path."""
    for folder in environment.get("LD_LIBRARY_PATH", "").split(":"):
        for name in _PLUGINS:
            if folder and (Path(folder) / name).exists():
                return str(Path(folder) / name)
    return f"none on LD_LIBRARY_PATH ({' or '.join(_PLUGINS)})"


def apex_kind() -> str:
    """Which apex is installed. The package of that name on PyPI is unrelated and has none of its modules."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "none"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "normalization").is_dir() or (folder / "optimizers").is_dir() for folder in folders):
        try:
            return metadata.version("apex")
        except metadata.PackageNotFoundError:
            return "of unknown version"
    return "not NVIDIA's or ROCm's but PyPI's package of that name, which nothing uses: pip uninstall apex"


def software_line(found: Mapping[str, str]) -> str:
    return "software: " + ", ".join(f"{name} {version}" for name, version in found.items())


def different_software(by_rank: Sequence[Mapping[str, str]], roster: Roster) -> list[str]:
    """One line for each name and version that differs from that of most ranks, with the ranks that have it."""
    lines = []
    names = dict.fromkeys(name for found in by_rank for name in found)
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(by_rank):
            ranks.setdefault(found.get(name, "none"), []).append(rank)
        most = max(ranks, key=lambda version: len(ranks[version]))
        lines += [
            f"  {name} {version} on {roster.several(members)}, {most} on {len(ranks[most])} ranks"
            for version, members in ranks.items()
            if version != most
        ]
    return lines
