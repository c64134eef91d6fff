"""The converting verbs: what `to-neox`, `reshard` and `to-hf` read, write and record."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.state_ranges import block_bytes
from megatron.layout import HEAD, PATCHES, LlamaShape, TensorSplit, padded_vocab_size

from ..errors import ConvertError
from ..formats.dtypes import BY_NAME, WEIGHT_DTYPES, DType
from ..formats.torch_file import plain_file
from ..sources.chat_files import put_chat, trained_chat
from ..sources.checkpoint import Checkpoint, check_duplicates
from ..sources.hf import SAFETENSORS_INDEX
from ..sources.llama_config import read_config_file
from ..sources.neox import SIDE
from ..sources.optimizer import open_optimizer
from ..sources.patch_config import PATCHES_FILE, as_json
from ..sources.settings import refuse_differences, with_trained_settings
from ..sources.side_files import shard_index, side_files, tokenizer_of
from ..stream.plan import plan_copies
from ..stream.publish import OutputFolder
from ..stream.targets import TargetFile, hf_files, neox_files, shards_by_size, shards_like
from .model_yml import model_keys, model_yml

if TYPE_CHECKING:
    from ..stream.optimizer import StateCopy

WRITTEN_BY = "tools/convert_hf"
PADDING = 128  # GPT-NeoX's default for make_vocab_size_divisible_by, used if the vocabulary has to be padded
DEFAULT_SHARD_SIZE = 5_000_000_000
_MEMORY_BASE = 48 << 20  # interpreter and tables
_MEMORY_TORCH = 256 << 20  # added once torch is imported for a cast
_LARGEST_BAND = 4 << 20  # larger bands leave the cache between reading, checksum and writing
_SMALLEST_BAND = 256 << 10
_MEMORY_NUMPY = 32 << 20  # added once numpy is imported for optimizer states
_OF_THE_RUN = ("consumed_samples", "precision", "optimizer", "data", "config", "train_batch_size")


@dataclass
class ConversionRequest:
    """The options that all converting verbs share."""

    output: Path
    dtype: str | None = None
    max_ram: int = 512 << 20
    threads: int = 4
    shard: tuple[int, int] = (1, 1)
    base_chat: bool = False  # to-hf: keep end tokens and chat template of the base model
    trained_settings: bool = False  # to-hf: write the training run's epsilon and rotary settings into config.json
    resume: bool = False
    force: bool = False
    band: int | None = None  # bytes of a band; None: as large as max_ram allows


@dataclass
class StateRequest:
    """Request to convert the optimizer state too, for `pp` stages and `dp` replicas (None: unchanged)."""

    pp: int | None = None
    dp: int | None = None


def prepare_neox(
    source: Checkpoint,
    tp: int,
    divisible_by: int | None,
    request: ConversionRequest,
    states: StateRequest | None = None,
) -> OutputFolder:
    """Plan pipeline layer files for `tp` ranks from a checkpoint of any kind; nothing is written yet.

    With `states`, the optimizer files of a training checkpoint are planned as well.
    """
    # The shape, with the vocabulary padded for `tp`.
    if divisible_by is None:
        divisible_by = source.divisible_by or (1 if tp > 0 and source.shape.vocab_size % tp == 0 else PADDING)
    if source.config is not None:
        shape = source.config.shape_for(divisible_by, tp)
        if shape.tied != source.shape.tied:
            shape = dataclasses.replace(shape, tied=source.shape.tied)
    else:
        padded = padded_vocab_size(source.shape.vocab_size, divisible_by, tp)
        shape = dataclasses.replace(source.shape, padded_vocab_size=padded)
        try:
            shape.check_tensor_parallel(tp)
        except ValueError as error:
            raise ConvertError(f"--tp {tp} does not fit this model: {error}") from None
    check_duplicates(source)
    # Layer files, side files and model.yml.
    tag = f"global_step{source.iteration}"
    rows = 0 if shape.modality == PATCHES else source.tensors["model.embed_tokens.weight"].shape[0]
    dtype_of = _dtype_of(source, request.dtype)
    files = neox_files(shape, tp, dtype_of, tag, rows)
    extras: dict[str, bytes | Path] = {}
    left: list[str] = []
    final = Path(request.output).absolute()
    keys = model_keys(source.config, divisible_by) if source.config is not None else {}
    if source.side_folder is not None or source.config_text is not None:
        travelling, left = _side_files(source)
        extras |= {f"{tag}/{SIDE}/{name}": path for name, path in travelling.items()}
        if source.config_text is not None:
            extras[f"{tag}/{SIDE}/config.json"] = source.config_text
        tokenizer = tokenizer_of(travelling)
        place = (tokenizer[0], final / tag / SIDE / tokenizer[1]) if tokenizer else None
        if keys:
            extras["model.yml"] = model_yml(keys, place).encode()
    # Provenance, optimizer files and the meta files of all ranks.
    layout, optimizer = {"tp": tp}, None
    provenance = _provenance(source, request) | {
        "iteration": source.iteration,
        "shape": dataclasses.asdict(shape),
        "config": {key: value for key, value in keys.items() if value is not None},
    }
    # A run that continues from this checkpoint compares its configuration with these.
    provenance |= {key: source.provenance[key] for key in ("data", "facts") if key in source.provenance}
    if states is not None:
        optimizer = _states(source, TensorSplit(shape, tp), request, states)
        layout |= {"pp": optimizer.pp, "dp": optimizer.dp}
        # A run that resumes the states also needs its position, precision and configuration.
        provenance |= {key: source.provenance[key] for key in _OF_THE_RUN if key in source.provenance}
    for rank in range(tp * layout.get("pp", 1)):
        name = f"mp_rank_{rank:02d}_model_states"
        meta = _meta(shape, layout, divisible_by, source.iteration, source.position)
        extras[f"{tag}/{name}.pt"] = plain_file(name, meta)
    extras["latest"] = f"{tag}\n".encode()
    output = _output(source, files, extras, tag, provenance | {"layout": layout}, request, left)
    output.optimizer = optimizer
    return output


def _states(source: Checkpoint, split: TensorSplit, request: ConversionRequest, states: StateRequest) -> StateCopy:
    """Plan the optimizer files of the new layout."""
    from megatron.checkpoint.optimizer_reader import CACHED_BLOCKS

    from ..stream.optimizer import StateCopy

    if request.dtype is not None:
        raise ConvertError(
            "--optimizer and --dtype cannot go together: optimizer states belong to weights in the type "
            "they were trained in; leave one of them out"
        )
    found = open_optimizer(source)
    saved = source.provenance["layout"]
    pp = saved["pp"] if states.pp is None else states.pp
    dp = saved["dp"] if states.dp is None else states.dp
    for option, size, most in (("--pp", pp, split.shape.num_layers), ("--dp", dp, None)):
        if size < 1 or (most is not None and size > most):
            raise ConvertError(f"{option} is {size}; expected 1 to {most or 'any number of replicas'}")
    # Each block is checksummed twice: more threads than cores would only wait.
    threads = min(request.threads, os.cpu_count() or 1)
    least = _MEMORY_BASE + _MEMORY_NUMPY + 2 * (threads + 2) * block_bytes()
    cached = (request.max_ram - least) // block_bytes() + threads
    if cached < threads:
        raise ConvertError(
            f"--max-ram {request.max_ram >> 20} MiB is too little for --optimizer with {threads} threads; give "
            f"at least {-(-least >> 20)} MiB, or fewer --threads"
        )
    return StateCopy(
        found.folder,
        found.files,
        found.index,
        split,
        pp,
        dp,
        threads=threads,
        cached_blocks=min(cached, CACHED_BLOCKS),
        shard=request.shard,
        verify_first=found.verify_whole_files,
    )


def prepare_hf(source: Checkpoint, shard_size: int | None, request: ConversionRequest) -> OutputFolder:
    """Plan a Hugging Face folder from a checkpoint of any kind; nothing is written yet."""
    if source.config is None or source.config_text is None:
        raise ConvertError(
            f"{source.root} has no config.json (GPT-NeoX does not keep one), and none is made up; "
            f"give the folder that the model came from: --hf-source HF_DIR"
        )
    if source.shape.tied != source.config.tied:
        raise ConvertError(
            f"{source.root} stores a tied model (no output head), but config.json says tie_word_embeddings false"
        )
    if not request.trained_settings:
        refuse_differences(source.run_settings(), source.config_settings())
    check_duplicates(source)
    tensors = {n: t for n, t in source.tensors.items() if not (source.config.tied and n == HEAD[0].hf[0])}
    dtype_of = _dtype_of(source, request.dtype)
    travelling, left = _side_files(source)
    index_path = shard_index(travelling)
    travelling.pop(SAFETENSORS_INDEX, None)
    # Shard as the source does, if it can be reused and no size is given.
    shards = None
    if index_path is not None and shard_size is None:
        weight_map = read_config_file(index_path).get("weight_map")
        if isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values()):
            shards = shards_like(weight_map, list(tensors))
    if shards is None:
        sizes = {n: t.nbytes // t.dtype.itemsize * dtype_of(n).itemsize for n, t in tensors.items()}
        shards = shards_by_size(sizes, shard_size or DEFAULT_SHARD_SIZE)
    files = hf_files(tensors, dtype_of, shards)
    # Configuration, chat format and index.
    extras: dict[str, bytes | Path] = dict(travelling)
    config = _config(source, request, {dtype_of(n).name for n in tensors})
    chat = None if request.base_chat else trained_chat(source.provenance)
    if chat is not None:
        raw = json.loads(config)
        changed, notes = put_chat(extras, raw, chat, source.shape.vocab_size)
        source.notes += notes
        config = config if changed == raw else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
    extras["config.json"] = config
    if source.config.patches is not None:
        extras[PATCHES_FILE] = as_json(source.config.patches)
    if len(files) > 1:
        total = sum(t.stored.nbytes for f in files for t in f.tensors)
        where = {t.stored.name: f.name for f in files for t in f.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        extras[SAFETENSORS_INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return _output(source, files, extras, ".", _provenance(source, request), request, left)


def execute(output: OutputFolder, progress: Callable[[int], None]) -> bool:
    """Check that the output can be written, then write it; False if other shares are not finished."""
    output.check()
    return output.write(progress)


def _output(
    source: Checkpoint,
    files: list[TargetFile],
    extras: dict[str, bytes | Path],
    tag: str,
    provenance: dict[str, Any],
    request: ConversionRequest,
    left: list[str],
) -> OutputFolder:
    casting = request.dtype is not None and any(t.dtype.name != request.dtype for t in source.tensors.values())
    band, threads = request.band, request.threads
    if band is None:
        band, threads = memory_plan(request.max_ram, request.threads, casting)
    plan = plan_copies(source.tensors, files, band, request.shard)
    return OutputFolder(
        final=request.output,
        plan=plan,
        extras=extras,
        manifest_in=tag,
        provenance=provenance,
        left_behind=[name for name in left if not _is_weight_file(name)],
        shard=request.shard,
        threads=threads,
        force=request.force,
        resume=request.resume,
    )


def _side_files(source: Checkpoint) -> tuple[dict[str, Path], list[str]]:
    """`side_files` of the checkpoint's side folder; a model trained on images has none."""
    return ({}, []) if source.side_folder is None else side_files(source.side_folder)


def _is_weight_file(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth"))


def memory_plan(max_ram: int, threads: int, casting: bool) -> tuple[int, int]:
    """(bytes of a band, threads) that keep anonymous memory under `max_ram` bytes."""
    # A cast holds its band, the result (up to twice as large) and the part being checked.
    factor = 4 if casting else 1
    budget = max_ram - _MEMORY_BASE - (_MEMORY_TORCH if casting else 0)
    for count in range(max(threads, 1), 0, -1):
        band = min(budget // (count * factor), _LARGEST_BAND)
        if band >= _SMALLEST_BAND:
            return band, count
    least = max_ram - budget + _SMALLEST_BAND * factor
    raise ConvertError(f"--max-ram {max_ram >> 20} MiB is too little for this job; give at least {-(-least >> 20)} MiB")


def _dtype_of(source: Checkpoint, wanted: str | None) -> Callable[[str], DType]:
    for tensor in source.tensors.values():
        if tensor.dtype.name not in WEIGHT_DTYPES:
            raise ConvertError(
                f"{source.root}: {tensor.name} is {tensor.dtype.name}; weights may be {', '.join(WEIGHT_DTYPES)}"
            )
    if wanted is not None:
        return lambda name: BY_NAME[wanted]
    return lambda name: source.tensors[name].dtype


def _meta(
    shape: LlamaShape, layout: Mapping[str, int], divisible_by: int, iteration: int, position: dict[str, Any]
) -> dict[str, Any]:
    """The meta file that DeepSpeed expects next to layer files. A pipeline reads those only if `module` is None."""
    tp = layout["tp"]
    arguments = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "make_vocab_size_divisible_by": divisible_by,
        "padded_vocab_size": shape.padded_vocab_size,
        "model_parallel_size": tp,
    }
    return {
        "module": None,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": iteration,
        "global_samples": 0,
        "dp_world_size": layout.get("dp", 1),
        "mp_world_size": tp * layout.get("pp", 1),
        "ds_config": {},
        "ds_version": "0.19.8",
        "iteration": iteration,
        "consumed_samples": 0,
        "args": arguments,
    } | position


def _provenance(source: Checkpoint, request: ConversionRequest) -> dict[str, Any]:
    record: dict[str, Any] = {"written_by": WRITTEN_BY, "source": str(source.root), "source_kind": source.kind}
    if source.given:
        record["given"] = source.given
    if request.dtype:
        record["cast_to"] = request.dtype
    if source.provenance:
        record["source_provenance"] = {k: v for k, v in source.provenance.items() if k != "source_provenance"}
    return record


def _config(source: Checkpoint, request: ConversionRequest, types: set[str]) -> bytes:
    """config.json byte for byte, unless the weights' type or (if requested) the trained settings differ from it."""
    assert source.config_text is not None
    assert source.config is not None
    before = json.loads(source.config_text)
    raw = dict(before)
    if request.trained_settings:
        raw = with_trained_settings(raw, source.run_settings(), source.config_settings())
    if len(types) == 1 and source.config.dtype not in types:
        for key in [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"]:
            raw[key] = next(iter(types))
    return source.config_text if raw == before else (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode()
