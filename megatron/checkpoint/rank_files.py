"""What a rank writes into a checkpoint: its share of the layer files, its meta file, its optimizer file.

For a save in the background the files are first copied to host memory. Every tensor has a buffer, allocated when it is
first copied and overwritten by each later snapshot: a rank holds one copy of its files' bytes, however often it saves.
Buffers for GPU tensors are pinned (torch rounds each up to a power of two), so that all copies are queued at once and
run at the speed of the link.

The copies run on the training stream and the snapshot waits for them: they start when the kernels of the step are done,
and the next step starts after them. A separate stream would overlap them with the next forward pass, at the cost of a
wait before the optimizer, and save a 70B on 2,048 GCDs the 0.02 s that 0.7 GB take on a Frontier node's 36 GB/s link
(OLCF's user guide).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.checkpoint.adapter_files import WEIGHTS_FILE, own_factors, write_factors
from megatron.checkpoint.discovery import meta_file_name
from megatron.checkpoint.layer_files import own_layers
from megatron.checkpoint.manifest import FileEntry
from megatron.checkpoint.optimizer_files import optimizer_file_name, write_optimizer_file
from megatron.checkpoint.state import TrainState, capture_rng, rng_to_bytes
from megatron.checkpoint.torch_files import write_file, write_tensors
from megatron.common.errors import CheckpointError
from megatron.layout import TensorRange

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine
    from megatron.neox_arguments import NeoXArgs


class FileKind(Enum):
    WEIGHTS = "weights"  # a flat dict of tensors, which the manifest lists one by one
    OPTIMIZER = "optimizer"  # {"shards": {TensorRange: {"step", "master", "exp_avg", "exp_avg_sq"}}, "rng": ...}
    ADAPTER = "adapter"  # a rank's share of a file: {"tensors": ..., "runs": where their bytes go}
    PLAIN = "plain"  # tensors and plain values, nested


@dataclass(frozen=True)
class FileContent:
    """The content of one file: tensors (live or copied) and plain values, nested in dicts, lists and tuples."""

    content: dict[str, Any]
    kind: FileKind = FileKind.PLAIN


Contents = dict[str, FileContent]  # by file name


def rank_contents(engine: Engine, args: NeoXArgs, state: TrainState) -> Contents:
    """Content of this rank's files. Tensors are the engine's own: the next step changes them."""
    if args.lora is None:
        contents = {name: FileContent(tensors, FileKind.WEIGHTS) for name, tensors in own_layers(engine).items()}
    else:
        factors = own_factors(engine, args, "" if state.base is None else state.base.fingerprint)
        contents = {WEIGHTS_FILE: FileContent(factors, FileKind.ADAPTER)}
    if engine.place.dp_rank == 0:
        meta = engine.meta_content() | _client_state(args, state)
        contents[meta_file_name(engine.place.model_rank)] = FileContent(meta)
    shards = {
        shard.where: {"step": shard.step, **shard.tensors} for shard in engine.optimizer_shards() if not shard.copy
    }
    optimizer: dict[str, Any] = {"shards": shards}
    if not args.no_save_rng:
        optimizer["rng"] = capture_rng()
    contents[optimizer_file_name(engine.place.rank)] = FileContent(optimizer, FileKind.OPTIMIZER)
    return contents


def write_contents(folder: Path, contents: Contents) -> dict[str, FileEntry]:
    """Write and sync the files; returns their manifest entries, except the adapter's, which all ranks write."""
    for name, file in contents.items():
        if file.kind is FileKind.ADAPTER:
            write_factors(folder / name, file.content)
    writers = {
        FileKind.WEIGHTS: write_tensors,
        FileKind.OPTIMIZER: _write_optimizer,
        FileKind.PLAIN: write_file,
    }
    return {
        name: writers[file.kind](folder / name, file.content)
        for name, file in contents.items()
        if file.kind is not FileKind.ADAPTER
    }


def _write_optimizer(path: Path, content: dict[str, Any]) -> FileEntry:
    shards = content["shards"]
    steps = {where: shard["step"] for where, shard in shards.items()}
    random_state = rng_to_bytes(content["rng"]) if "rng" in content else b""
    return write_optimizer_file(path, steps, partial(_raw, path, shards), random_state)


def _raw(path: Path, shards: dict[TensorRange, dict[str, Tensor]], where: TensorRange, kind: str) -> memoryview:
    tensor = shards[where][kind]
    if tensor.dtype != torch.float32:
        raise CheckpointError(f"{path}: {kind} of {where} is {tensor.dtype}; optimizer state is kept in fp32")
    return tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy().data


def _client_state(args: NeoXArgs, state: TrainState) -> dict[str, Any]:
    """The keys that GPT-NeoX expects besides DeepSpeed's, and the run's position."""
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


# --- copies in host memory

_Path = tuple[Any, ...]  # file name, then the keys and positions that lead to a tensor


class HostCopies:
    """The buffers of one rank. A snapshot is valid until the next one is taken."""

    def __init__(self) -> None:
        self.buffers: dict[_Path, Tensor] = {}

    def snapshot(self, contents: Contents) -> Contents:
        """Copy `contents` as it is now, tensors to host memory. Returns when all copies are done."""
        copies = {name: replace(file, content=self._copy(file.content, (name,))) for name, file in contents.items()}
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, value: Any, path: _Path) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value, path)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._copy(item, (*path, key))) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._copy(item, (*path, place)) for place, item in enumerate(value))
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: Tensor, path: _Path) -> Tensor:
        buffer = self.buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[path] = buffer
        buffer.copy_(tensor.detach(), non_blocking=True)
        return buffer.detach().requires_grad_(tensor.requires_grad)  # saved with the tensor


def tensor_bytes(contents: Contents) -> int:
    """Bytes of all tensors, which is what a snapshot of them takes."""
    return sum(tensor.nbytes for file in contents.values() for tensor in _tensors(file.content))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
