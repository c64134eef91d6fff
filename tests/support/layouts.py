"""Training runs saved at one layout and resumed at another, and the complete state of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.checkpoint import state_ranges
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.optimizer_reader import StateReader
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.layout import LlamaShape, TensorRow, layer_files, rank_shape, rank_slices, recorded_shape, source_shapes
from tests.support.checkpoint_runs import STEPS, STOP, arguments, train
from tests.support.engine_runs import build, load
from tests.support.log_lines import LogLines
from tests.support.models import Case

Layout = tuple[int, int, int]  # TP, PP, DP
KINDS = ("master", "exp_avg", "exp_avg_sq")


def save_and_go_on(
    rank: int, world_size: int, case: Case, layout: Layout, precision: str, folder: str, block: int, **more: Any
) -> Any:
    """Train, save, and continue in the same layout; returns the losses and norms after the save.

    `block` is the number of elements of an optimizer file's block; `more` are further keys of the configuration.
    """
    state_ranges.BLOCK = block
    args = arguments(case, *layout, precision=precision, save=folder, checkpoint_factor=STOP, **more)
    engine = build(args, case)
    state = TrainState()
    train(engine, args, state, STOP, case)
    save_checkpoint(engine, args, state, data_fingerprints={})
    return train(engine, args, state, STEPS - STOP, case)


def resume_elsewhere(
    rank: int,
    world_size: int,
    case: Case,
    layout: Layout,
    precision: str,
    folder: str,
    again: str,
    block: int,
    **more: Any,
) -> Any:
    """Start from different weights, load at another layout, save at once, and continue; `more` are further keys.

    Returns losses and norms, the log, and the optimizer files that this rank opened.
    """
    state_ranges.BLOCK = block
    keys = {"precision": precision, "load": folder, "save": again, "checkpoint_factor": STOP, **more}
    args = arguments(case, *layout, from_scratch=False, **keys)
    engine = build(args, case, seed=1)
    log = LogLines(rank)
    opened: set[str] = set()
    read_block = StateReader._read_block

    def noted(self: StateReader, placed: Any, *arguments: Any) -> Any:
        opened.add(placed.file)
        return read_block(self, placed, *arguments)

    StateReader._read_block = noted  # type: ignore[method-assign]
    state = load(engine, args)
    assert engine.counters.steps == STOP
    save_checkpoint(engine, args, state, data_fingerprints={})
    return train(engine, args, state, STEPS - STOP, case), log.lines, opened


def whole_state(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Weights, masters and moments of a checkpoint by (kind, Hugging Face name), each assembled from all files.

    Asserts that every element is stored exactly once and that replicas are equal. Reads the files with safetensors and
    torch, and of the project's code uses only the layout table and its packings.
    """
    manifest = read_manifest(folder)
    shape, tp = recorded_shape(manifest.provenance["shape"]), manifest.provenance["layout"]["tp"]
    stored: dict[tuple[str, int, str, int], Tensor] = {}
    seen: dict[tuple[str, int, str, int], Tensor] = {}
    rows = {(index, row.neox): (layer, row) for index, layer, found in layer_files(shape) for row in found}
    for index, name in rows:
        for tp_rank in range(tp):
            file = folder / f"layer_{index:02d}-model_{tp_rank:02d}-model_states.pt"
            stored["weight", index, name, tp_rank] = torch.load(file, weights_only=True)[name].reshape(-1)
            for kind in KINDS:
                numel = stored["weight", index, name, tp_rank].numel()
                stored[kind, index, name, tp_rank] = torch.full((numel,), torch.nan)
                seen[kind, index, name, tp_rank] = torch.zeros(numel, dtype=torch.int64)
    for path in sorted(folder.glob("*_optim_states.safetensors")):
        for key, tensor in load_file(path).items():
            if key == "random_state":
                continue
            layer, rest = key.split(".", 1)
            name, tp_rank, start, kind = rest.rsplit(".", 3)
            place = (kind, int(layer), name, int(tp_rank))
            stored[place][int(start) : int(start) + len(tensor)] = tensor
            seen[place][int(start) : int(start) + len(tensor)] += 1
    assert all(bool((count == 1).all()) for count in seen.values())
    whole: dict[tuple[str, str], Tensor] = {}
    for (index, name), (layer, row) in rows.items():
        for kind in ("weight", *KINDS):
            parts = [stored[kind, index, name, tp_rank] for tp_rank in range(tp)]
            names = [source.format(layer=layer) for source in row.hf]
            whole |= {(kind, source): t for source, t in zip(names, _joined(row, shape, tp, parts), strict=True)}
    return whole


def _joined(row: TensorRow, shape: LlamaShape, tp: int, parts: list[Tensor]) -> list[Tensor]:
    if row.replicated:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return [parts[0]]
    sources = [torch.empty(size, dtype=parts[0].dtype) for size in source_shapes(row, shape)]
    for tp_rank, part in enumerate(parts):
        local, position = part.view(rank_shape(row, shape, tp)), 0
        for piece in rank_slices(row, shape, tp, tp_rank):
            if piece.source is not None:
                into = sources[piece.source].narrow(row.shard_dim or 0, piece.start, len(piece))
                into.copy_(local.narrow(row.shard_dim or 0, position, len(piece)))
            position += len(piece)
    return sources
