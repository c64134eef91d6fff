"""A checkpoint that a run may begin from: found, whole, and of the configured model. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.discovery import find_checkpoint
from megatron.checkpoint.facts import check_model, recorded_facts
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

    @property
    def layout(self) -> Mapping[str, Any]:
        """TP, PP and DP of the run that wrote it, by `tp`, `pp`, `dp`; what is not known is left out."""
        if self.manifest is None:
            return layout_of_names(path.name for path in self.folder.iterdir())
        layout = self.provenance.get("layout")
        return layout if isinstance(layout, Mapping) else {}

    def entry(self, name: str) -> FileEntry | None:
        """What the manifest says of a file; None without a manifest."""
        return None if self.manifest is None else self.manifest.files.get(name)

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What it knows of its model, and of its run."""
        config = self.folder / "hf" / "config.json"
        return recorded_facts(self.provenance, config.read_bytes() if config.is_file() else None)


def saved_checkpoint(root: Path, iteration: int | None, args: NeoXArgs, options: str | None = None) -> SavedCheckpoint:
    """The checkpoint in `root`; CheckpointError if there is none, or if it holds another model than `args` describe.

    `options` are those under which the run takes its own checkpoints, for the message.
    """
    folder = find_checkpoint(root, iteration, options)
    found = SavedCheckpoint(folder, read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None)
    check_model(folder, found.facts()[0], args)
    return found
