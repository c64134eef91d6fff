"""Checkpoints for tests: written from the layout table without an engine, and a stand-in engine that can be saved."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint.discovery import LATEST, tag_name
from megatron.checkpoint.layer_set import expected_files
from megatron.checkpoint.manifest import Manifest, write_manifest
from megatron.checkpoint.state_ranges import STATE_KINDS
from megatron.checkpoint.torch_files import write_tensors
from megatron.engine.optimizer_shards import OptimizerShard
from megatron.layout import LlamaShape, TensorRange, rank_shape
from megatron.parallel.place import Place

# A rank, the largest file that it can write, in bytes, and the file of the stand-in engine's save that fails there.
FULL_DISKS = [
    (0, 1000, "layer_00-model_00-model_states.pt"),
    (1, 3000, "layer_02-model_01-model_states.pt"),  # after some files that fit
    (2, 12000, "rank_00002_optim_states.safetensors"),
]

SHAPE = LlamaShape(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_kv_heads=2,
    intermediate_size=24,
    vocab_size=30,
    padded_vocab_size=32,
    tied=False,
)


def weights(shape: LlamaShape, tp: int, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """Random tensors by layer file and name; replicated ones are equal on all tensor-parallel ranks."""
    files = {}
    for name, rows in expected_files(shape, tp).items():
        seed = sum(map(ord, name[: len("layer_00")]))
        generator = torch.Generator().manual_seed(seed)
        files[name] = {row.neox: torch.randn(rank_shape(row, shape, tp), generator=generator).to(dtype) for row in rows}
    return files


def write_weights(
    root: Path,
    shape: LlamaShape = SHAPE,
    tp: int = 2,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    manifest: bool = True,
    **provenance: Any,
) -> Path:
    """Write a complete weights-only checkpoint, as the converter does; returns its folder."""
    folder = root / tag_name(step)
    folder.mkdir(parents=True)
    entries = {name: write_tensors(folder / name, tensors) for name, tensors in weights(shape, tp, dtype).items()}
    if manifest:
        write_manifest(folder, Manifest(entries, provenance))
    (root / LATEST).write_text(folder.name)
    return folder


def rewrite(path: Path, change: Any) -> None:
    """Load a torch file's dict, let `change` edit it, and write it back, as a careless tool would."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


class StandingEngine:
    """The part of an engine that a save uses, tensor-parallel over all ranks, with a toy optimizer state."""

    def __init__(self, args: Any, rank: int, world_size: int) -> None:
        self.place = Place(
            rank=rank,
            local_rank=rank,
            device=torch.device("cpu"),
            tp_rank=rank,
            pp_rank=0,
            dp_rank=0,
            tp=world_size,
            pp=1,
            dp=1,
        )
        self._layers = [
            (int(name[6:8]), module_of(tensors))
            for name, tensors in weights(args.shape, world_size).items()
            if name.endswith(f"model_{rank:02d}-model_states.pt")
        ]

    def numbered_layers(self) -> list[tuple[int, nn.Module]]:
        return self._layers

    def meta_content(self) -> dict[str, Any]:
        return {"module": None, "global_steps": 0}

    def optimizer_shards(self) -> list[OptimizerShard]:
        """All of this rank's parameters; the toy's masters and moments are zero."""
        return [
            OptimizerShard(
                TensorRange(index, name, self.place.tp_rank, 0, parameter.numel()),
                dict.fromkeys(STATE_KINDS, torch.zeros(parameter.numel())),
                step=1,
            )
            for index, layer in self._layers
            for name, parameter in layer.named_parameters()
        ]


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    """A module whose parameters have these names, dots included."""
    module = nn.Module()
    for name, tensor in tensors.items():
        parent = module
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(leaf, nn.Parameter(tensor))
    return module


def standing_args(save: Path | str, **keys: Any) -> Any:
    """The part of NeoXArgs that `save_checkpoint` reads."""
    base = {
        "save": str(save),
        "shape": SHAPE,
        "merged": {"num_layers": SHAPE.num_layers},
        "precision": "fp32",
        "lora": None,
        "reads_images": False,
        "trained_shape": SHAPE,
        "train_batch_size": 8,
        "no_save_rng": False,
        "keep_last_n_checkpoints": None,
        "keep_optimizer_last_n": None,
        "num_layers": SHAPE.num_layers,
        "hidden_size": SHAPE.hidden_size,
        "num_attention_heads": SHAPE.num_attention_heads,
        "max_position_embeddings": 16,
        "make_vocab_size_divisible_by": 1,
        "padded_vocab_size": SHAPE.padded_vocab_size,
        "tokenizer_type": "HFTokenizer",
        "vocab_file": None,
        "model_parallel_size": 2,
        "model_dump_json": lambda include: json.dumps(dict.fromkeys(include)),
    }
    return SimpleNamespace(**(base | keys))


def wasted_bytes(path: Path) -> int:
    """Bytes of a torch file's storages that no tensor uses: a view saved without cloning includes its whole buffer."""
    from megatron.checkpoint.torch_files import read_file

    storages: dict[int, int] = {}
    used = 0

    def visit(value: Any) -> None:
        nonlocal used
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            used += value.numel() * value.element_size()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(read_file(path))
    assert used, f"{path} holds no tensor"
    return sum(storages.values()) - used
