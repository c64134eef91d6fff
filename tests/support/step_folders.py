"""Checkpoint folders that are complete but almost empty."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.discovery import publish, tag_name
from megatron.checkpoint.manifest import FileEntry, Manifest, checksum, write_manifest

LAYER = "layer_00-model_00-model_states.pt"


def write_step(root: Path, step: int, by: str = "training", job: str | None = None) -> None:
    """Write a complete checkpoint of `step` under `root`, and make `latest` name it."""
    partial = root / (tag_name(step) + ".tmp")
    partial.mkdir(parents=True)
    (partial / LAYER).write_bytes(b"weights")
    entries = {LAYER: FileEntry(7, {}, checksum(b"weights"))}
    write_manifest(partial, Manifest(entries, {"written_by": by, "job": job}))
    publish(partial, root / tag_name(step))
