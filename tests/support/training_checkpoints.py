"""Training checkpoints with optimizer state at any layout, written without an engine."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.discovery import LATEST, meta_file_name, tag_name
from megatron.checkpoint.manifest import FileEntry, Manifest, file_checksum, write_manifest
from megatron.checkpoint.optimizer_files import optimizer_file_name, write_optimizer_file
from megatron.checkpoint.torch_files import write_tensors
from megatron.layout import (
    LlamaShape,
    TensorRange,
    layer_file_name,
    layer_files,
    rank_shape,
    rank_slices,
    source_shapes,
)

STEP = 7


def write_training_checkpoint(
    root: Path, shape: LlamaShape, tp: int, pp: int, dp: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write random masters and moments, and weights that are the rounded masters; returns the folder of the step.

    Every tensor's state is cut at random positions and assigned to random ranks. No engine does so, but the format
    allows it.
    """
    folder, draw = root / tag_name(STEP), random.Random(seed)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, dict[str, Tensor]] = {}
    by_rank: dict[int, dict[TensorRange, dict[str, Tensor]]] = {rank: {} for rank in range(tp * pp * dp)}
    for index, _, rows in layer_files(shape):
        for row in rows:
            wholes = [
                {kind: torch.randn(size, generator=generator) for kind in ("master", "exp_avg", "exp_avg_sq")}
                for size in source_shapes(row, shape)
            ]
            for tp_rank in range(tp):
                # This rank's shard of masters and moments, packed from the whole sources; zeros are padding.
                state = {}
                for kind in ("master", "exp_avg", "exp_avg_sq"):
                    pieces = []
                    for part in rank_slices(row, shape, tp, tp_rank):
                        if part.source is None:
                            pieces.append(torch.zeros(len(part), *wholes[0][kind].shape[1:]))
                        else:
                            pieces.append(wholes[part.source][kind].narrow(row.shard_dim or 0, part.start, len(part)))
                    state[kind] = torch.cat(pieces, row.shard_dim or 0).contiguous()
                assert state["master"].shape == rank_shape(row, shape, tp)
                weights.setdefault(layer_file_name(index, tp_rank), {})[row.neox] = state["master"].to(dtype)
                # Ranges between random cuts, each on a random rank.
                numel = state["master"].numel()
                cuts = sorted({0, numel, *(draw.randrange(1, numel) for _ in range(3))})
                for start, stop in pairwise(cuts):
                    flat = {kind: tensor.reshape(-1)[start:stop].clone() for kind, tensor in state.items()}
                    by_rank[draw.randrange(tp * pp * dp)][TensorRange(index, row.neox, tp_rank, start, stop)] = flat
    # Layer files, optimizer files, meta files, and the manifest that lists them.
    entries: dict[str, FileEntry] = {name: write_tensors(folder / name, tensors) for name, tensors in weights.items()}
    for rank, shards in by_rank.items():
        name = optimizer_file_name(rank)

        def raw(where: TensorRange, kind: str, shards: Any = shards) -> memoryview:
            return shards[where][kind].numpy().data

        entries[name] = write_optimizer_file(folder / name, dict.fromkeys(shards, STEP), raw)
    meta = {"module": None, "iteration": STEP, "consumed_samples": 8 * STEP, "global_steps": STEP}
    meta |= {"global_samples": 8 * STEP, "skipped_steps": 0, "skipped_in_a_row": 0, "args": {"num_attention_heads": 1}}
    for model_rank in range(tp * pp):
        name = meta_file_name(model_rank)
        torch.save(meta, folder / name)
        entries[name] = FileEntry((folder / name).stat().st_size, {}, file_checksum(folder / name))
    provenance = {
        "written_by": "training",
        "iteration": STEP,
        "consumed_samples": 8 * STEP,
        "precision": "bfloat16" if dtype is torch.bfloat16 else "fp32",
        "layout": {"tp": tp, "pp": pp, "dp": dp},
        "shape": dataclasses.asdict(shape),
        "optimizer": True,
        "data": {"toy": "1"},
        "config": {"make_vocab_size_divisible_by": 1},
    }
    write_manifest(folder, Manifest(entries, provenance))
    (root / LATEST).write_text(folder.name + "\n")
    return folder
