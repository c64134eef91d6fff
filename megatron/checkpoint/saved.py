"""Finds a checkpoint that a run may start from: complete, and of the configured model. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.discovery import find_checkpoint, step_of, steps_in
from megatron.checkpoint.facts import check_kind, check_model, recorded_facts
from megatron.checkpoint.gpt_neox import layout_of_names
from megatron.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint folder and its manifest, None if GPT-NeoX wrote it."""

    folder: Path
    manifest: Manifest | None

    @property
    def provenance(self) -> dict[str, Any]:
        return {} if self.manifest is None else self.manifest.provenance

    @cached_property
    def layout(self) -> Mapping[str, Any]:
        """TP, PP and DP of the run that wrote it, by `tp`, `pp`, `dp`; unknown ones are left out."""
        if self.manifest is None:
            return layout_of_names(path.name for path in self.folder.iterdir())
        layout = self.provenance.get("layout")
        return layout if isinstance(layout, Mapping) else {}

    def entry(self, name: str) -> FileEntry | None:
        """What the manifest says of a file; None without a manifest."""
        return None if self.manifest is None else self.manifest.files.get(name)

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The recorded facts of its model, and of its run."""
        config = self.folder / "hf" / "config.json"
        return recorded_facts(self.provenance, config.read_bytes() if config.is_file() else None)


def saved_base(checkpoint: SavedCheckpoint, args: NeoXArgs) -> SavedCheckpoint:
    """The base of an adapter's checkpoint, from `load`: the step it was trained on if still there, else the latest."""
    assert args.load is not None
    root = Path(args.load)
    step = step_of(Path(checkpoint.provenance["base"]["folder"]))
    return saved_checkpoint(root, step if step in steps_in(root) else None, args)


def saved_checkpoint(
    root: Path, iteration: int | None, args: NeoXArgs, options: str | None = None, *, own: bool = False
) -> SavedCheckpoint:
    """The checkpoint in `root`; CheckpointError if there is none, or its model is not the one that `args` describe.

    `own`: it is one of the run's own, which with `lora` hold an adapter. `options` are those that make the run resume
    its own checkpoints, for the message.
    """
    folder = find_checkpoint(root, iteration, options)
    found = SavedCheckpoint(folder, read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None)
    check_kind(folder, found.provenance, args, is_base=not own)
    check_model(folder, found.facts()[0], args)
    return found
