"""The adapter of a checkpoint: a peft folder, with whole tensors in one file that all ranks write into.

The offset of each tensor follows from the configuration, so ranks write their parts without communicating, and any
layout reads its parts by slicing. Rank 0 first fills the file with 0xFF bytes, which are NaN in every precision: a
part that no rank wrote is found when the file is read back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron import layout
from megatron.checkpoint.manifest import FileEntry, file_checksum
from megatron.checkpoint.torch_files import tensor_entry
from megatron.checkpoint.verified import damage, verified
from megatron.common.errors import CheckpointError, first_problems
from megatron.common.safetensors_header import header_bytes
from megatron.layout.peft_folder import CONFIG, FOLDER, WEIGHTS, PeftAdapter, config_text, read_adapter

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine
    from megatron.neox_arguments import NeoXArgs

WEIGHTS_FILE = f"{FOLDER}/{WEIGHTS}"
FINGERPRINT = "base_fingerprint"  # in the metadata of the file
_TYPES = {"fp32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class AdapterFile:
    """Where the tensors of `adapter_model.safetensors` lie: (offset, shape) by peft's name."""

    header: bytes
    places: dict[str, tuple[int, tuple[int, ...]]]
    dtype: torch.dtype
    size: int

    @classmethod
    def of(cls, args: NeoXArgs, fingerprint: str) -> AdapterFile:
        name, dtype = _TYPES[args.precision]
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", FINGERPRINT: fingerprint}}
        position, shapes = 0, {}
        for _, layer, rows in layout.layer_files(args.trained_shape):
            assert layer is not None
            for row in rows:
                (shape,) = layout.source_shapes(row, args.trained_shape)
                end = position + shape[0] * shape[1] * dtype.itemsize
                key = layout.peft_name(row, layer)
                entries[key] = {"dtype": name, "shape": list(shape), "data_offsets": [position, end]}
                shapes[key] = (position, shape)
                position = end
        header = header_bytes(entries)
        places = {key: (len(header) + offset, shape) for key, (offset, shape) in shapes.items()}
        return cls(header, places, dtype, len(header) + position)


# --- writing


def lay_out(folder: Path, args: NeoXArgs, base_name: str | None, fingerprint: str) -> None:
    """Create `folder`/adapter: its configuration and a weights file full of NaN. On rank 0, before any rank writes."""
    assert args.lora is not None
    (folder / FOLDER).mkdir()
    lora = args.lora
    text = config_text(
        rank=lora.rank, alpha=lora.alpha, rslora=lora.rslora, targets=lora.projections, base_name=base_name
    )
    with open(folder / FOLDER / CONFIG, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    plan = AdapterFile.of(args, fingerprint)
    with open(folder / WEIGHTS_FILE, "wb") as raw:
        raw.write(plan.header)
        for start in range(len(plan.header), plan.size, _CHUNK):
            raw.write(b"\xff" * min(_CHUNK, plan.size - start))


def own_factors(engine: Engine, args: NeoXArgs, fingerprint: str) -> dict[str, Any]:
    """This rank's share of the adapter: {"tensors": live tensors by peft's name, "runs": where their bytes go}.

    Data-parallel ranks take the factors of their stage in turn; of a replicated factor only tp_rank 0 writes its copy.
    Runs are (offset in the file, bytes) of consecutive bytes of the tensor.
    """
    place, plan = engine.place, AdapterFile.of(args, fingerprint)
    tensors: dict[str, Tensor] = {}
    runs: dict[str, list[tuple[int, int]]] = {}
    for turn, (index, row, parameter) in enumerate(_factors(engine, args)):
        if turn % place.dp != place.dp_rank or (row.replicated and place.tp_rank):
            continue
        key = layout.peft_name(row, index - layout.decoder_index(0))
        offset, shape = plan.places[key]
        (piece,) = layout.rank_slices(row, args.trained_shape, place.tp, place.tp_rank)
        item = plan.dtype.itemsize
        if row.shard_dim == 1:
            runs[key] = [(offset + (r * shape[1] + piece.start) * item, len(piece) * item) for r in range(shape[0])]
        else:
            runs[key] = [(offset + piece.start * shape[1] * item, len(piece) * shape[1] * item)]
        tensors[key] = parameter.detach()
    return {"tensors": tensors, "runs": runs}


def write_factors(path: Path, content: Mapping[str, Any]) -> None:
    """Write a rank's share into the file that rank 0 has laid out, and sync it. OSError with the file's name."""
    try:
        with open(path, "r+b", buffering=0) as file:
            for key, tensor in content["tensors"].items():
                data = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
                position = 0
                for offset, count in content["runs"][key]:
                    _write(file.fileno(), data[position : position + count], offset)
                    position += count
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def adapter_entries(folder: Path) -> dict[str, FileEntry]:
    """Read the adapter's files back; returns their manifest entries. CheckpointError if an element was not written."""
    tensors = {}
    with _opened(folder / WEIGHTS_FILE) as file:
        for key in file.keys():  # noqa: SIM118  not a mapping
            tensor = file.get_tensor(key)
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{folder / WEIGHTS_FILE}: {key} is not finite, or was not written whole")
            tensors[key] = tensor_entry(tensor)
    entries = {}
    for name, listed in ((WEIGHTS_FILE, tensors), (f"{FOLDER}/{CONFIG}", {})):
        path = folder / name
        entries[name] = FileEntry(path.stat().st_size, listed, file_checksum(path))
    return entries


# --- reading


@torch.no_grad()
def load_adapter(
    engine: Engine, args: NeoXArgs, folder: Path, entries: Mapping[str, FileEntry] | None = None
) -> str | None:
    """Fill this rank's factors from a peft folder; returns the fingerprint of its base, None if it records none.

    With the `entries` of the checkpoint that contains the folder, everything read is compared with its checksums.
    CheckpointError names what does not fit. Not collective.
    """
    check_fits(read_adapter(folder), args, folder)
    found: str | None = None
    with verified(folder / CONFIG, (entries or {}).get(f"{FOLDER}/{CONFIG}")), _opened(folder / WEIGHTS) as file:
        found = (file.metadata() or {}).get(FINGERPRINT)
        listed = entries[WEIGHTS_FILE].tensors if entries and WEIGHTS_FILE in entries else {}
        for index, row, parameter in _factors(engine, args):
            key = layout.peft_name(row, index - layout.decoder_index(0))
            whole = file.get_tensor(key)
            if key in listed and (entry := tensor_entry(whole)) != listed[key]:
                raise CheckpointError(damage(folder / WEIGHTS, entry.checksum, listed[key].checksum, key))
            if not bool(torch.isfinite(whole).all()):
                raise CheckpointError(f"{folder / WEIGHTS}: {key} holds values that are not finite")
            (piece,) = layout.rank_slices(row, args.trained_shape, engine.place.tp, engine.place.tp_rank)
            parameter.copy_(whole.narrow(row.shard_dim or 0, piece.start, len(piece)))
    return found


def check_fits(adapter: PeftAdapter, args: NeoXArgs, folder: Path) -> None:
    """Raise CheckpointError unless the adapter has the configuration's settings and the model's shapes."""
    lora = args.lora
    assert lora is not None
    says = {
        "num_layers": (adapter.num_layers, args.num_layers),
        "rank": (adapter.rank, lora.rank),
        "alpha": (adapter.alpha, lora.alpha),
        "targets": (adapter.targets, lora.projections),
        "rslora": (adapter.rslora, lora.rslora),
    }
    wrong = [f"{name} is {_text(has)}, here {_text(want)}" for name, (has, want) in says.items() if has != want]
    if not wrong:
        expected = {
            layout.peft_name(row, layer): layout.source_shapes(row, args.trained_shape)[0]
            for _, layer, rows in layout.layer_files(args.trained_shape)
            for row in rows
            if layer is not None
        }
        wrong = [
            f"{key} is {list(shape)}, here {list(expected[key])}"
            for key, shape in adapter.shapes.items()
            if shape != expected[key]
        ]
    if wrong:
        raise CheckpointError(f"{folder} is not the adapter that the configuration describes: {first_problems(wrong)}")


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _factors(engine: Engine, args: NeoXArgs) -> Iterator[tuple[int, layout.TensorRow, Tensor]]:
    """(layer file number, row, parameter) of every factor on this rank, layer by layer."""
    for index, layer in engine.numbered_layers():
        parameters = dict(layer.named_parameters())
        for row in layout.rows_of(index, args.trained_shape):
            yield index, row, parameters[row.neox]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
