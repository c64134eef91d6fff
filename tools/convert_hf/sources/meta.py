"""Meta's own checkpoints: `consolidated.*.pth` with `params.json`.

Meta's rotary embedding rotates adjacent pairs of a head, Hugging Face's and GPT-NeoX's rotate halves: rows of q and k
are permuted, row 2 i + j of a head becoming row j d/2 + i. All other tensors are split over ranks as in Meta's code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron.layout import HEAD, LlamaShape

from ..errors import ConvertError
from ..formats.safetensors_file import is_size
from ..formats.stored import Stored
from ..formats.torch_file import open_torch
from ..stream.tensor_map import Logical, Region, chunk_region, whole_region
from .checkpoint import Checkpoint, OpenOptions, check_shape
from .llama_config import LlamaConfig, parse_config, read_config_file

_FILE = re.compile(r"consolidated\.(\d{2})\.pth")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
# (Meta's name, Hugging Face's name, dimension split over ranks (None: replicated), whether rows are permuted).
_LAYER = (
    ("attention_norm.weight", "input_layernorm.weight", None, False),
    ("attention.wq.weight", "self_attn.q_proj.weight", 0, True),
    ("attention.wk.weight", "self_attn.k_proj.weight", 0, True),
    ("attention.wv.weight", "self_attn.v_proj.weight", 0, False),
    ("attention.wo.weight", "self_attn.o_proj.weight", 1, False),
    ("ffn_norm.weight", "post_attention_layernorm.weight", None, False),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", 0, False),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", 0, False),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", 1, False),
)
# (width, layers) of the models with scaled rotary frequencies, and the factor in their config.json. Meta's reference
# code hard-codes 8 for all of them, which is wrong for 3.2; params.json does not give it.
_ROPE_FACTOR = {(4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0, (2048, 16): 32.0, (3072, 28): 32.0}
_TIED = {(2048, 16), (3072, 28)}


class MetaFolder:
    """A folder as Meta publishes it."""

    expected = "consolidated.*.pth with params.json"

    def recognizes(self, path: Path, names: list[str]) -> bool:
        return "params.json" in names and any(_FILE.fullmatch(n) for n in names)

    def open(self, path: Path, names: list[str], options: OpenOptions) -> Checkpoint:
        return _open(path, names, options)


def _open(path: Path, names: list[str], options: OpenOptions) -> Checkpoint:
    numbers = [int(m[1]) for n in names if (m := _FILE.fullmatch(n))]
    if numbers != list(range(len(numbers))):
        raise ConvertError(f"{path}: consolidated files are missing; found {numbers}")
    ranks = [_read(path / f"consolidated.{number:02d}.pth") for number in numbers]
    params = read_config_file(path / "params.json")
    source = options.hf_source if options.hf_source else path if "config.json" in names else None
    notes: list[str] = []
    if source is not None:
        text = (source / "config.json").read_bytes()
        config = parse_config(read_config_file(source / "config.json"), str(source / "config.json"), options.given)
    else:
        raw = _derive(params, ranks, path, options.given)
        text = (json.dumps(raw, indent=2) + "\n").encode()
        config = parse_config(raw, f"{path / 'params.json'} as config.json", options.given)
        notes.append(
            "config.json is derived from params.json; with --hf-source HF_DIR the published one is used instead "
            "(an Instruct model has more end-of-text ids)"
        )
    shape = config.shape(config.vocab_size)
    _check_split(shape, len(ranks), path)
    checkpoint = Checkpoint(
        root=path,
        kind="meta consolidated",
        tensors={},
        shape=shape,
        config=config,
        config_text=text,
        side_folder=source or path,
        tp=len(ranks),
        notes=notes,
        given=options.given,
    )
    _collect(ranks, config, checkpoint)
    return checkpoint


def _read(path: Path) -> dict[str, Stored]:
    return {name: stored for name, stored in open_torch(path).tensors().items() if name != "rope.freqs"}


def _check_split(shape: LlamaShape, count: int, path: Path) -> None:
    try:
        shape.check_tensor_parallel(count)
    except ValueError as error:
        raise ConvertError(f"{path}: {count} consolidated files do not fit this model: {error}") from None


def _collect(ranks: list[dict[str, Stored]], config: LlamaConfig, checkpoint: Checkpoint) -> None:
    remaining = [dict(rank) for rank in ranks]
    h, kv = config.hidden_size, config.num_kv_heads * (config.hidden_size // config.num_attention_heads)
    sizes = {
        "input_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (h, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, h),
        "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (config.intermediate_size, h),
        "mlp.up_proj.weight": (config.intermediate_size, h),
        "mlp.down_proj.weight": (h, config.intermediate_size),
    }

    def take(meta: str, name: str, full: tuple[int, ...], dim: int | None, permuted: bool = False) -> None:
        checkpoint.tensors[name] = _logical(remaining, meta, name, full, dim, permuted, config, checkpoint.root)

    vocabulary = (config.vocab_size, h)
    # Llama-2 splits the embedding by columns, Llama-3 by rows.
    by_columns = remaining[0].get(_EMBEDDING) and remaining[0][_EMBEDDING].shape[0] == config.vocab_size
    embedding = "model.embed_tokens.weight"
    take(_EMBEDDING, embedding, vocabulary, 1 if by_columns else 0)
    for layer in range(config.num_layers):
        for meta, hf, dim, permuted in _LAYER:
            take(f"layers.{layer}.{meta}", f"model.layers.{layer}.{hf}", sizes[hf], dim, permuted)
    take("norm.weight", "model.norm.weight", (h,), None)
    head = HEAD[0].hf[0]
    if not config.tied:
        take(_HEAD, head, vocabulary, 0)
    elif _HEAD in remaining[0]:
        copy = _logical(remaining, _HEAD, head, vocabulary, 0, False, config, checkpoint.root)
        problem = f"{checkpoint.root}: a tied model, but {_HEAD} differs from {_EMBEDDING}; nothing is dropped"
        checkpoint.duplicates.append((checkpoint.tensors[embedding], copy, problem))
        checkpoint.notes.append(f"{_HEAD} repeats the tied embedding and is not copied")
    for number, rank in enumerate(remaining):
        if rank:
            few = ", ".join(sorted(rank)[:3])
            raise ConvertError(f"{checkpoint.root}: consolidated.{number:02d}.pth holds unexpected tensors: {few}")


def _logical(
    remaining: list[dict[str, Stored]],
    meta: str,
    name: str,
    full: tuple[int, ...],
    dim: int | None,
    permuted: bool,
    config: LlamaConfig,
    root: Path,
) -> Logical:
    result: Logical | None = None
    local = tuple(n // len(remaining) if d == dim else n for d, n in enumerate(full))
    for number, rank in enumerate(remaining):
        if meta not in rank:
            raise ConvertError(f"{root}: consolidated.{number:02d}.pth holds no {meta}")
        stored = rank.pop(meta)
        check_shape(stored.shape, local, f"{stored.path}: tensor {meta}")
        result = result or Logical(name, full, stored.dtype)
        if stored.dtype != result.dtype:
            raise ConvertError(f"{stored.path}: {meta} is {stored.dtype.name}, in other files {result.dtype.name}")
        if dim is None:
            if number:
                result.replicas.append(stored)
            else:
                result.regions.append(whole_region(stored, name))
        elif permuted:
            head_dim = config.hidden_size // config.num_attention_heads
            result.regions += unpaired(stored, name, head_dim, number * local[0])
        else:
            result.regions.append(chunk_region(stored, name, dim, number))
    assert result is not None
    return result


def unpaired(stored: Stored, name: str, head_dim: int, to_row: int) -> list[Region]:
    """Regions that reorder rows from adjacent rotary pairs to half-split order, head by head."""
    half = head_dim // 2
    return [
        Region(stored, name, head + j, 0, half, stored.shape[1], to_row=to_row + head + j * half, step=2)
        for head in range(0, stored.shape[0], head_dim)
        for j in range(2)
    ]


def _derive(
    params: dict[str, Any], ranks: list[dict[str, Stored]], path: Path, given: dict[str, Any]
) -> dict[str, Any]:
    """`config.json` from `params.json`, with the values that Meta's code takes from its own defaults."""
    where = path / "params.json"

    def need(key: str) -> int:
        if not is_size(params.get(key)) or not params[key]:
            raise ConvertError(f"{where}: {key} must be a positive whole number, not {params.get(key)!r}")
        return int(params[key])

    # Sizes, from params.json and the shapes of tensors.
    dim, layers, heads = need("dim"), need("n_layers"), need("n_heads")
    down = ranks[0].get("layers.0.feed_forward.w2.weight")
    norm_eps, embedding = params.get("norm_eps"), ranks[0].get(_EMBEDDING)
    if down is None or embedding is None or len(down.shape) != 2 or len(embedding.shape) != 2:
        raise ConvertError(f"{path}: the embedding or the first layer is missing; this is not one of Meta's Llamas")
    rows = embedding.shape[0]
    vocabulary = rows if embedding.shape[1] * len(ranks) == dim else rows * len(ranks)
    stated = params.get("vocab_size", -1)
    if stated not in (-1, vocabulary):
        raise ConvertError(f"{where}: vocab_size {stated!r}, but the embedding has {vocabulary} rows")
    intermediate = down.shape[1] * len(ranks)
    _check_width(params, dim, intermediate, where)
    scaled = bool(params.get("use_scaled_rope", False))
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "rms_norm_eps": norm_eps,
        "rope_theta": params.get("rope_theta", 10000.0),  # hard-coded in Meta's Llama-2 code; params.json lacks it
        "tie_word_embeddings": _HEAD not in ranks[0] or (dim, layers) in _TIED,
        "torch_dtype": down.dtype.name,
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    # The vocabulary's size tells the generation: Llama-3 or Llama-2.
    if vocabulary == 128256:
        raw |= {"bos_token_id": 128000, "eos_token_id": 128001}
    elif vocabulary == 32000:
        raw |= {"bos_token_id": 1, "eos_token_id": 2}
    # Context length and rotary scaling.
    if not scaled:
        raw["rope_scaling"] = None
        known = {(128256, 500000.0): 8192, (32000, 10000.0): 4096 if norm_eps == 1e-5 else None}
        length = known.get((vocabulary, raw["rope_theta"]))
        if length:
            raw["max_position_embeddings"] = length
    else:
        factor = params.get("rope_scaling_factor", _ROPE_FACTOR.get((dim, layers)))
        raw["max_position_embeddings"] = 131072
        if factor is not None:
            raw["rope_scaling"] = {
                "factor": factor,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            }
    return raw | {key: value for key, value in given.items() if key not in raw}


def _check_width(params: dict[str, Any], dim: int, intermediate: int, where: Path) -> None:
    """Check that Meta's rule for the MLP's width gives the width of the tensors."""
    if "multiple_of" not in params:
        return
    multiple = params["multiple_of"]
    if not is_size(multiple) or not multiple:
        raise ConvertError(f"{where}: multiple_of must be a positive whole number, not {multiple!r}")
    width = int(2 * 4 * dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    width = -(-width // multiple) * multiple
    if width != intermediate:
        raise ConvertError(f"{where} gives an MLP of width {width}, the tensors have {intermediate}")
