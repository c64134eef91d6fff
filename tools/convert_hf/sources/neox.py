"""GPT-NeoX checkpoints: pipeline layer files, or the sequential layout inside `mp_rank` files, at any TP."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.discovery import LATEST, find_checkpoint
from megatron.checkpoint.foreign import refuse_foreign
from megatron.checkpoint.manifest import MANIFEST_NAME, ManifestError, read_manifest, size_problems
from megatron.common.errors import CheckpointError
from megatron.layout import (
    DECODER_LAYER,
    HEAD,
    LlamaShape,
    Packing,
    TensorRow,
    decoder_index,
    final_norm_index,
    head_index,
    layer_files,
    rank_shape,
    recorded_shape,
    source_shapes,
)
from megatron.layout.peft_folder import CONFIG, FOLDER

from ..errors import ConvertError
from ..formats.pickles import Inert, TensorView
from ..formats.stored import Stored
from ..formats.torch_file import open_torch
from ..stream.tensor_map import Logical, chunk_region, layout_regions, whole_region
from .checkpoint import Checkpoint, OpenOptions, check_shape
from .llama_config import LlamaConfig, parse_config, read_config_file
from .patch_config import as_json, trained_config
from .settings import Settings, settings_of_files, settings_of_keys

_LAYER = re.compile(r"layer_(\d{2,4})-model_(\d{2,4})-model_states\.pt")
_META = re.compile(r"mp_rank_(\d{2,5})_model_states\.pt")
_SEQUENTIAL = re.compile(r"sequential\.(\d{1,4})\.(.+)")
_TRAINING = "training"  # `written_by` of the trainer's manifests
SIDE = "hf"  # subfolder with config.json, tokenizer, ... kept with the weights

_QKV = next(row for row in DECODER_LAYER if row.packing is Packing.QKV)
# Names of the MLP before 2024: separate gate, up and down.
_LEGACY = {
    "mlp.w1.weight": ("mlp.gate_proj", 0),
    "mlp.w3.weight": ("mlp.up_proj", 0),
    "mlp.w2.weight": ("mlp.down_proj", 1),
}
_MODERN_MLP = ("mlp.linear1.weight", "mlp.linear2.weight")
_POSITION = (
    "iteration",
    "consumed_samples",
    "lr_scheduler",
    "global_steps",
    "global_samples",
    "skipped_steps",
    "skipped_in_a_row",
)
# Entries without weights that other writers store among the weights.
_EMPTY = re.compile(r"(.*\.)?(_extra_state|rotary_emb\.inv_freq)")


@dataclass
class _Files:
    """The tensors of a checkpoint by layer-file number and rank, and its other metadata."""

    folder: Path
    kind: str
    ranks: list[dict[int, dict[str, Stored]]]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def tp(self) -> int:
        return len(self.ranks)


class NeoxCheckpoint(Checkpoint):
    """A GPT-NeoX checkpoint: files of tensor-parallel ranks, with the training configuration that produced them."""

    packed_by_rank = True

    @property
    def iteration(self) -> int:
        name = self.root.name.removeprefix("global_step")
        return int(name) if name.isdecimal() and name.isascii() else 0

    def run_settings(self) -> Settings | None:
        if self.provenance.get("written_by") == _TRAINING:
            return settings_of_keys(self.provenance.get("config"), f"{self.root}/manifest.json")
        model_yml = self.root.parent / "model.yml"
        configs = [model_yml] if model_yml.is_file() else sorted((self.root / "configs").glob("*.yml"))
        return settings_of_files(configs) or self.config_settings()


class NeoxFolder:
    """A folder with `latest`, or the folder of a single step."""

    expected = "GPT-NeoX layer files"

    def recognizes(self, path: Path, names: list[str]) -> bool:
        return LATEST in names or any(_LAYER.fullmatch(n) or _META.fullmatch(n) for n in names)

    def open(self, path: Path, names: list[str], options: OpenOptions) -> Checkpoint:
        return _open(path, names, options)


def _open(path: Path, names: list[str], options: OpenOptions) -> NeoxCheckpoint:
    folder = _tag_folder(path) if LATEST in names else path
    names = sorted(p.name for p in folder.iterdir())
    notes, provenance = [], {}
    if MANIFEST_NAME in names:
        try:
            manifest = read_manifest(folder)
        except ManifestError as error:
            raise ConvertError(str(error)) from None
        problems = size_problems(folder, manifest)
        if problems:
            raise ConvertError("; ".join(problems[:3]))
        provenance = manifest.provenance
    else:
        notes.append("no manifest (a GPT-NeoX checkpoint?): read after full key, shape and shard-count checks")
    if (folder / FOLDER / CONFIG).is_file():
        raise ConvertError(
            f"{folder} holds an adapter, not a model: run to-hf with its base as --input and --adapter {folder}"
        )
    # Tensors by layer and rank.
    layers = [n for n in names if _LAYER.fullmatch(n)]
    if not layers and not any(_META.fullmatch(n) for n in names):
        refuse_foreign(folder)
    files = _pipeline(folder, layers, names) if layers else _sequential(folder, names)
    # The configuration: from the side folder, or from the manifest of a run on images.
    side = _side_folder(folder, options)
    config = config_text = None
    given = dict(provenance["given"]) if isinstance(provenance.get("given"), dict) else {}
    if side is not None:
        config_path = side / "config.json"
        given |= options.given
        config = parse_config(read_config_file(config_path), str(config_path), given)
        config_text = config_path.read_bytes()
    elif (trained := trained_config(provenance, str(folder / MANIFEST_NAME))) is not None:
        config_text = as_json(trained)
        config = parse_config(trained, str(folder / MANIFEST_NAME), given)
    # The shape, and the padding of the vocabulary if training recorded it.
    shape = _shape(files, config, provenance)
    recorded = provenance.get("config")
    for described in (recorded, files.meta.get("args")):
        if isinstance(described, dict) and isinstance(described.get("make_vocab_size_divisible_by"), int):
            divisible = described["make_vocab_size_divisible_by"]
            break
    else:
        divisible = None
    checkpoint = NeoxCheckpoint(
        root=folder,
        kind=files.kind,
        tensors={},
        shape=shape,
        config=config,
        config_text=config_text,
        side_folder=side,
        tp=files.tp,
        divisible_by=divisible,
        position=_position(files.meta),
        notes=notes,
        provenance=provenance,
        given=given,
    )
    _collect(files, shape, checkpoint)
    return checkpoint


def _tag_folder(path: Path) -> Path:
    try:
        return find_checkpoint(path, sequential=True)
    except (CheckpointError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path / LATEST}: {error}") from None


def _position(meta: dict[str, Any]) -> dict[str, Any]:
    """The training position recorded in the meta file of a training checkpoint; plain values only."""
    return {key: meta[key] for key in _POSITION if key in meta and _plain(meta[key])}


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _side_folder(folder: Path, options: OpenOptions) -> Path | None:
    candidates = [options.hf_source] if options.hf_source else [folder / SIDE, folder.parent / SIDE]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    if options.hf_source:
        raise ConvertError(f"--hf-source {options.hf_source} holds no config.json")
    return None


def _pipeline(folder: Path, layers: list[str], names: list[str]) -> _Files:
    found: dict[tuple[int, int], str] = {}
    for name in layers:
        match = _LAYER.fullmatch(name)
        assert match
        key = (int(match[1]), int(match[2]))
        if key in found:
            raise ConvertError(f"{folder}: {name} and {found[key]} are the same layer and rank")
        found[key] = name
    indices = sorted({index for index, _ in found})
    tp = 1 + max(rank for _, rank in found)
    missing = [(i, r) for i in indices for r in range(tp) if (i, r) not in found]
    if missing:
        few = ", ".join(f"layer {i:02d} of rank {r:02d}" for i, r in missing[:4])
        raise ConvertError(f"{folder}: {tp} tensor-parallel ranks, but {len(missing)} files are missing: {few}")
    meta = _meta(folder, names)
    arguments = meta.get("args")
    recorded = arguments.get("model_parallel_size") if isinstance(arguments, dict) else None
    if recorded is not None and recorded != tp:
        raise ConvertError(f"{folder}: written with model_parallel_size {recorded}, but there are files of {tp} ranks")
    ranks: list[dict[int, dict[str, Stored]]] = []
    for rank in range(tp):
        ranks.append({})
        for index in indices:
            tensors = open_torch(folder / found[index, rank]).tensors()
            ranks[-1][index] = {n: stored for n, stored in tensors.items() if not _EMPTY.fullmatch(n)}
    return _Files(folder, "neox pipeline", ranks, meta)


def _meta(folder: Path, names: list[str]) -> dict[str, Any]:
    first = next((n for n in names if _META.fullmatch(n)), None)
    if first is None:
        return {}
    value = open_torch(folder / first, inert=True).value
    if not isinstance(value, dict):
        raise ConvertError(f"{folder / first} does not hold a dict")
    return value


def _sequential(folder: Path, names: list[str]) -> _Files:
    metas = [n for n in names if _META.fullmatch(n)]
    numbers = [int(m[1]) for n in metas if (m := _META.fullmatch(n))]
    if numbers != list(range(len(numbers))):
        raise ConvertError(f"{folder}: mp_rank files are missing; found {numbers}")
    ranks: list[dict[int, dict[str, Stored]]] = []
    meta: dict[str, Any] = {}
    for name in metas:
        file = open_torch(folder / name, inert=True)
        module = file.value.get("module") if isinstance(file.value, dict) else None
        if module is None:
            raise ConvertError(
                f"{folder}: {name} holds no module, and there are no layer files: the checkpoint has no weights"
            )
        meta = meta or file.value
        layers: dict[int, dict[str, Stored]] = {}
        views = {n: v for n, v in module.items() if isinstance(v, TensorView)} if isinstance(module, dict) else {}
        if not isinstance(module, dict) or any(
            not isinstance(v, TensorView | Inert | None) and v is not None for v in module.values()
        ):
            raise ConvertError(f"{folder / name}: module is not a dict of tensors")
        for key, view in views.items():
            match = _SEQUENTIAL.fullmatch(key)
            if not match:
                raise ConvertError(f"{folder / name}: unexpected tensor {key}; expected sequential.<layer>.<name>")
            if not _EMPTY.fullmatch(match[2]):
                layers.setdefault(int(match[1]), {})[match[2]] = file.stored(key, view)
        ranks.append(layers)
    if any(set(r) != set(ranks[0]) for r in ranks):
        raise ConvertError(f"{folder}: the mp_rank files hold different layers")
    return _Files(folder, "neox sequential", ranks, meta)


def _shape(files: _Files, config: LlamaConfig | None, provenance: dict[str, Any]) -> LlamaShape:
    first = files.ranks[0]
    if config is not None and config.patches is not None:
        return config.shape(0)
    embedding = first.get(0, {}).get("word_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConvertError(f"{files.folder}: layer 0 has no word_embeddings.weight")
    padded = embedding.shape[0] * files.tp
    if config is not None:
        if padded < config.vocab_size:
            raise ConvertError(f"{files.folder}: {padded} embedding rows for a vocabulary of {config.vocab_size}")
        indices = set(first)
        head = head_index(config.num_layers)
        stored_tied = head not in indices
        if stored_tied and not config.tied:
            raise ConvertError(
                f"{files.folder}: there is no output head (layer {head:02d}), but config.json says "
                f"tie_word_embeddings false; a layer file is missing, or config.json belongs to another model"
            )
        return replace(config.shape(padded), tied=stored_tied)
    recorded = provenance.get("shape")
    if isinstance(recorded, dict):
        try:
            return recorded_shape(recorded)
        except TypeError:
            raise ConvertError(f"{files.folder}: the manifest records an unknown model shape") from None
    return _guess_shape(files, embedding.shape[1], padded)


def _guess_shape(files: _Files, hidden: int, padded: int) -> LlamaShape:
    """Infer sizes from the tensors and the recorded arguments, for a checkpoint without config.json."""
    first = files.ranks[0]
    norm = [i for i, tensors in first.items() if "norm.scale" in tensors]
    arguments = files.meta.get("args")
    heads = arguments.get("num_attention_heads") if isinstance(arguments, dict) else None
    if len(norm) != 1 or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ConvertError(
            f"{files.folder}: the files do not say how many attention heads the model has; "
            f"give a folder with the model's config.json: --hf-source HF_DIR"
        )
    layers = norm[0] - final_norm_index(0)
    layer = first.get(decoder_index(0), {})
    qkv, down = layer.get(_QKV.neox), layer.get("mlp.linear2.weight") or layer.get("mlp.w2.weight")
    if qkv is None or down is None or len(down.shape) != 2:
        raise ConvertError(f"{files.folder}: layer {decoder_index(0):02d} is not a Llama layer")
    kv = (qkv.shape[0] * files.tp - hidden) // (2 * (hidden // heads))
    return LlamaShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=max(kv, 1),
        intermediate_size=down.shape[1] * files.tp,
        vocab_size=padded,
        padded_vocab_size=padded,
        tied=head_index(layers) not in first,
    )


def _collect(files: _Files, shape: LlamaShape, checkpoint: Checkpoint) -> None:
    """Fill the checkpoint's tensors after full key, shape and shard-count checks."""
    try:
        shape.check_tensor_parallel(files.tp)
    except ValueError as error:
        raise ConvertError(f"{files.folder}: files of {files.tp} ranks do not fit this model: {error}") from None
    # The layers of every rank.
    expected = {index: (layer, rows) for index, layer, rows in layer_files(shape)}
    for rank, layers in enumerate(files.ranks):
        for index in sorted(set(expected) ^ {i for i, t in layers.items() if t}):
            problem = "is missing" if index in expected else "is unexpected"
            raise ConvertError(
                f"{files.folder}: layer {index:02d} {problem} (rank {rank:02d}, {shape.num_layers} layers)"
            )
    # The tensors of every layer.
    for index, (layer, rows) in expected.items():
        legacy = layer is not None and any(n in files.ranks[0][index] for n in _LEGACY)
        if legacy:
            rows = tuple(r for r in rows if r.neox not in _MODERN_MLP)
        for rank, layers in enumerate(files.ranks):
            names = {r.neox for r in rows} | (set(_LEGACY) if legacy else set())
            for name in sorted(names ^ set(layers[index])):
                problem = "is missing" if name in names else "is unexpected"
                raise ConvertError(f"{files.folder}: layer {index:02d} of rank {rank:02d}: tensor {name} {problem}")
        for row in rows:
            _collect_row(files, shape, checkpoint, index, layer, row)
        if legacy:
            _collect_legacy(files, shape, checkpoint, index, layer)
    if any("mlp.w1.weight" in t for t in files.ranks[0].values()):
        checkpoint.notes.append("MLP tensors have their pre-2024 names (w1, w2, w3)")
    for tensor in checkpoint.tensors.values():
        if not tensor.covered():
            raise ConvertError(f"{files.folder}: the shards do not cover {tensor.name}")
    _tie(files, shape, checkpoint)


def _add(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], stored: Stored) -> Logical:
    tensor = checkpoint.tensors.setdefault(name, Logical(name, shape, stored.dtype))
    if tensor.dtype != stored.dtype:
        raise ConvertError(f"{stored.path}: {stored.name} is {stored.dtype.name}, in other ranks {tensor.dtype.name}")
    return tensor


def _collect_row(
    files: _Files, shape: LlamaShape, checkpoint: Checkpoint, index: int, layer: int | None, row: TensorRow
) -> None:
    names = [name.format(layer=layer) for name in row.hf]
    shapes = dict(zip(names, source_shapes(row, shape), strict=True))
    for rank in range(files.tp):
        stored = files.ranks[rank][index][row.neox]
        check_shape(stored.shape, rank_shape(row, shape, files.tp), f"{stored.path}: tensor {row.neox}")
        if row.replicated:
            tensor = _add(checkpoint, names[0], shapes[names[0]], stored)
            if rank:
                tensor.replicas.append(stored)
            else:
                tensor.regions.append(whole_region(stored, names[0]))
            continue
        for region in layout_regions(row, layer, shape, files.tp, rank, stored):
            if region.logical is not None:
                _add(checkpoint, region.logical, shapes[region.logical], stored).regions.append(region)


def _collect_legacy(files: _Files, shape: LlamaShape, checkpoint: Checkpoint, index: int, layer: int | None) -> None:
    for neox, (module, dim) in _LEGACY.items():
        name = f"model.layers.{layer}.{module}.weight"
        full = (
            (shape.intermediate_size, shape.hidden_size) if dim == 0 else (shape.hidden_size, shape.intermediate_size)
        )
        local = tuple(n // files.tp if d == dim else n for d, n in enumerate(full))
        for rank in range(files.tp):
            stored = files.ranks[rank][index][neox]
            check_shape(stored.shape, local, f"{stored.path}: tensor {neox}")
            _add(checkpoint, name, full, stored).regions.append(chunk_region(stored, name, dim, rank))


def _tie(files: _Files, shape: LlamaShape, checkpoint: Checkpoint) -> None:
    """Drop the separate head of a model that config.json declares tied, if and only if it equals the embedding."""
    if checkpoint.config is None or not checkpoint.config.tied or shape.tied:
        return
    head = checkpoint.tensors.pop(HEAD[0].hf[0])
    checkpoint.duplicates.append(
        (
            checkpoint.tensors["model.embed_tokens.weight"],
            head,
            f"{files.folder}: config.json says tie_word_embeddings true, but the stored output head differs from the "
            f"embedding; it cannot be exported as a tied model",
        )
    )
    checkpoint.notes.append("the stored output head repeats the tied embedding and is not copied")
    checkpoint.shape = replace(shape, tied=True)
