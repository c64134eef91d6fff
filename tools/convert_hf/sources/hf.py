"""Hugging Face folders: safetensors or `pytorch_model*.bin`, one file or sharded, with `config.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron.common.quantity import quantity
from megatron.layout import HEAD, layer_files, source_shapes

from ..errors import ConvertError
from ..formats.safetensors_file import read_safetensors_header
from ..formats.stored import Stored
from ..formats.torch_file import open_torch
from ..stream.tensor_map import Logical, whole_region
from .checkpoint import Checkpoint, OpenOptions, check_shape
from .llama_config import parse_config, read_config_file

SAFETENSORS_INDEX = "model.safetensors.index.json"
_LAYOUTS = (
    (SAFETENSORS_INDEX, "hf safetensors"),
    ("model.safetensors", "hf safetensors"),
    ("pytorch_model.bin.index.json", "hf bin"),
    ("pytorch_model.bin", "hf bin"),
)
_WEIGHTS = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)")
# Rotary frequencies that older files carry; they follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class HuggingFaceFolder:
    """A folder as `save_pretrained` writes it."""

    expected = "safetensors or pytorch_model*.bin with config.json"

    def recognizes(self, path: Path, names: list[str]) -> bool:
        """True for weights in one of the usual files, or safetensors whose index is missing."""
        return any(n in names for n, _ in _LAYOUTS) or any(re.fullmatch(r"model-.*\.safetensors", n) for n in names)

    def open(self, path: Path, names: list[str], options: OpenOptions) -> Checkpoint:
        return _open(path, names, options)


def _open(path: Path, names: list[str], options: OpenOptions) -> Checkpoint:
    config_path = path / "config.json"
    if "config.json" not in names:
        raise ConvertError(f"{config_path} is missing; copy the model's config.json into this folder")
    raw = read_config_file(config_path)
    config = parse_config(raw, str(config_path), options.given)
    # Find the one set of weights, and read its headers.
    sets = [(n, kind) for n, kind in _LAYOUTS if n in names]
    if len(sets) > 1:
        both = " and ".join(n for n, _ in sets)
        raise ConvertError(
            f"{path} holds more than one set of weights: {both}. The intended one is ambiguous (transformers may "
            f"load a different one than you expect): move all but one set to another folder"
        )
    found = sets[0] if sets else None
    if found is None:
        raise ConvertError(f"{path / SAFETENSORS_INDEX} is missing: several weight files need their index")
    stored = _indexed(path, found[0]) if found[0].endswith(".json") else _read_file(path / found[0])
    # Set aside what is not copied.
    shape = config.shape(config.vocab_size)
    notes, tensors = [], {}
    used = {s.path.name for s in stored.values()}
    unused = [n for n in names if _WEIGHTS.fullmatch(n) and n not in used]
    if unused:
        notes.append(f"{quantity(len(unused), 'weight file')} not listed in {found[0]}: {', '.join(unused[:3])}")
    dropped = [name for name in stored if _DERIVED.fullmatch(name)]
    if dropped:
        notes.append(f"{len(dropped)} rotary_emb.inv_freq tensors are derived from config.json and not copied")
    remaining = {name: s for name, s in stored.items() if name not in dropped}
    # Every tensor of the model must be there, with the configured shape.
    for _, layer, rows in layer_files(shape):
        for row in rows:
            for name, expected in zip(row.hf, source_shapes(row, shape), strict=True):
                name = name.format(layer=layer)
                if name not in remaining:
                    raise ConvertError(f"{path}: tensor {name} is missing; the download is incomplete or not a Llama")
                tensors[name] = _logical(remaining.pop(name), name, expected)
    checkpoint = Checkpoint(
        root=path,
        kind=found[1],
        tensors=tensors,
        shape=shape,
        config=config,
        config_text=config_path.read_bytes(),
        side_folder=path,
        notes=notes,
        given=options.given,
    )
    # A head that repeats the tied embedding is compared with it later; nothing else may remain.
    head = HEAD[0].hf[0]
    if config.tied and head in remaining:
        embedding = tensors["model.embed_tokens.weight"]
        copy = _logical(remaining.pop(head), head, embedding.shape)
        checkpoint.duplicates.append(
            (
                embedding,
                copy,
                f"{path}: tie_word_embeddings is true, but {head} differs from model.embed_tokens.weight; "
                f"one of them is wrong, so neither is dropped. Correct config.json if the model is not tied",
            )
        )
        notes.append(f"{head} repeats the tied embedding and is not copied")
    if remaining:
        few = ", ".join(sorted(remaining)[:3])
        raise ConvertError(f"{path}: {len(remaining)} unexpected tensors, such as {few}; this is not a plain Llama")
    return checkpoint


def _logical(stored: Stored, name: str, expected: tuple[int, ...]) -> Logical:
    check_shape(stored.shape, expected, f"{stored.path}: tensor {name}")
    return Logical(name, expected, stored.dtype, [whole_region(stored, name)])


def _indexed(path: Path, index_name: str) -> dict[str, Stored]:
    index_path = path / index_name
    index: Any = read_config_file(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index_path} has no weight_map")
    listed: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not plain_name(name):
            raise ConvertError(f"{index_path}: the file of {tensor}, {name!r}, is not a plain file name")
        listed.setdefault(name, set()).add(tensor)
    for name in sorted(listed):
        if not (path / name).is_file():
            raise ConvertError(f"{path / name} is missing, but {index_name} lists it; complete the download")
    stored: dict[str, Stored] = {}
    for name in sorted(listed):
        here = _read_file(path / name)
        for tensor in sorted(listed[name] ^ set(here)):
            problem = "is not in it" if tensor in listed[name] else "is in it, but not listed"
            raise ConvertError(f"{path / name}: according to {index_name}, tensor {tensor} {problem}")
        stored |= here
    return stored


def plain_name(name: object) -> bool:
    """Whether `name` is a file name without a path, as an index must give it."""
    return isinstance(name, str) and bool(name) and not set(name) & set("/\\\0") and name not in (".", "..")


def _read_file(path: Path) -> dict[str, Stored]:
    if path.suffix == ".safetensors":
        return read_safetensors_header(path)
    return open_torch(path).tensors()
