"""Where a checkpoint comes from: configuration, commit, versions, data, layout, position."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron.layout import LlamaShape

_REPOSITORY = Path(__file__).resolve().parents[2]
_DISTRIBUTIONS = ("torch", "deepspeed", "megatron-core", "neox-llama")
TRAINING = "training"  # value of `written_by`; the converter has its own


def provenance(
    *,
    iteration: int,
    consumed_samples: int,
    train_batch_size: int,
    merged: Mapping[str, Any],
    shape: LlamaShape,
    precision: str,
    layout: Mapping[str, int],
    data: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest's `provenance` of a training checkpoint; plain JSON values.

    `merged` are the YAML keys as the user gave them, `layout` the sizes tp, pp and dp, `data` one fingerprint for each
    data source as the caller computes it, `facts` what a later configuration is compared with (`facts.facts_of`).
    """
    return {
        "written_by": TRAINING,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "iteration": iteration,
        "consumed_samples": consumed_samples,
        "train_batch_size": train_batch_size,
        "precision": precision,
        "layout": dict(layout),
        "shape": dataclasses.asdict(shape),
        "optimizer": True,
        "commit": commit(),
        "versions": versions(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "data": dict(data),
        "facts": dict(facts),
        "config": dict(merged),
    }


def commit() -> str | None:
    """Commit of the program's repository, with `-dirty` if files differ from it; None outside of a repository."""
    if not (_REPOSITORY / ".git").exists():
        return None
    command = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
