"""What a rank writes into a checkpoint: its share of the layer files, its meta file, its optimizer file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.layer_files import own_layers
from megatron.checkpoint.manifest import FileEntry
from megatron.checkpoint.state import TrainState, capture_rng
from megatron.checkpoint.torch_files import write_file, write_tensors
from megatron.engine.deepspeed_files import OPTIMIZER_CLASSES, Place, meta_content, optimizer_content

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from megatron.neox_arguments import NeoXArgs


@dataclass(frozen=True)
class FileContent:
    """One file to be: tensors (live, or copies of them) and plain values, nested in dicts, lists and tuples.

    `weights` marks a flat dict of tensors, which the manifest lists one by one; other files may hold instances of
    `classes` too.
    """

    content: dict[str, Any]
    weights: bool = False
    classes: tuple[type, ...] = ()


Contents = dict[str, FileContent]  # by file name


def rank_contents(engine: PipelineEngine, args: NeoXArgs, state: TrainState, place: Place) -> Contents:
    """This rank's files as they are now. Tensors are the engine's own: the next step changes them."""
    contents = {name: FileContent(tensors, weights=True) for name, tensors in own_layers(engine.module).items()}
    if place.dp_rank == 0:
        meta = meta_content(engine) | _client_state(args, state)
        if meta["lr_scheduler"] is None:
            meta["lr_scheduler"] = state.lr_scheduler_state
        contents[place.meta_file] = FileContent(meta)
    optimizer = optimizer_content(engine)
    if not args.no_save_rng:
        optimizer["rng"] = capture_rng()
    contents[place.optimizer_file] = FileContent(optimizer, classes=OPTIMIZER_CLASSES)
    return contents


def write_contents(folder: Path, contents: Contents) -> dict[str, FileEntry]:
    """Write the files, synced and read back; returns their manifest entries."""
    return {
        name: write_tensors(folder / name, file.content)
        if file.weights
        else write_file(folder / name, file.content, file.classes)
        for name, file in contents.items()
    }


def _client_state(args: NeoXArgs, state: TrainState) -> dict[str, Any]:
    """What GPT-NeoX expects beside DeepSpeed's keys, and our position."""
    names = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "tokenizer_type",
        "model_parallel_size",
    )
    return {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "skipped_in_a_row": state.skipped_in_a_row,
        "args": {name: getattr(args, name) for name in names},
    }
