"""The one table of Llama tensors: NeoX name, Hugging Face source, shard dimension and packing.

The model splits its fused projections with it, the converter plans byte ranges from it, checkpoints are checked
against it. Nothing else in this project knows a packing order, so the two can never move apart (gpt-neox #1337:
model and converter each held a convention, one of them moved, and a 70B run started at a loss of 12).

The module imports neither torch nor anything of this project: a login node can use it.

Facts (GPT-NeoX checkpoint format, `docs/checkpoints.md`):

- layer files: 0 embedding, 1 a transpose without parameters, 2..L+1 decoder layers, L+2 a transpose, L+3 final
  norm, L+4 output head. A tied model has no head file.
- `query_key_value` rows of a rank, grouped-query attention: all local q heads, all local k heads, all local v
  heads. Multi-head attention (`num_kv_heads == num_attention_heads`): q, k, v of head 0, q, k, v of head 1, ...
- `mlp.linear1` rows of a rank: up first, then gate (the half that goes through SiLU).
- vocabulary matrices are padded at the end and split by rows; norms are copies, equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that fix every tensor of a Llama; `vocab_size` is the true one, `padded_vocab_size` the stored."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def multi_head(self) -> bool:
        """Every query head has its own key and value head; GPT-NeoX then packs rows head by head."""
        return self.num_kv_heads == self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the stored model, padding included, replicated norms counted once."""
        h, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        layer = 2 * h * h + 2 * h * kv + 3 * h * self.intermediate_size + 2 * h
        return self.num_layers * layer + h + self.padded_vocab_size * h * (1 if self.tied else 2)

    def check_tensor_parallel(self, tp: int) -> None:
        """Raise ValueError if a tensor of this shape cannot be split over `tp` ranks."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        for name in ("num_attention_heads", "num_kv_heads", "intermediate_size", "padded_vocab_size"):
            size = getattr(self, name)
            if tp < 1 or size % tp:
                raise ValueError(
                    f"model_parallel_size {tp} does not divide {name} {size}; "
                    f"choose a tensor-parallel size that divides it"
                )
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_attention_heads {self.num_attention_heads}"
            )


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Smallest multiple of `divisible_by * tp` that holds `vocab_size` rows (GPT-NeoX's rule)."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


class Packing(Enum):
    """How the rows (or columns) of the source tensors are dealt to the tensor-parallel ranks."""

    REPLICATED = "replicated"  # every rank holds the whole tensor
    SPLIT = "split"  # one source, contiguous equal chunks
    VOCAB = "vocab"  # one source, padded at the end, contiguous equal chunks
    QKV = "qkv"  # q, k, v by whole heads
    UP_GATE = "up_gate"  # one chunk of up, then one chunk of gate


@dataclass(frozen=True)
class TensorLayout:
    """One row of the table: a tensor of a NeoX layer file and the Hugging Face tensors it is made of.

    `hf` holds one name per source, in packing order, with `{layer}` for the decoder layer. `shard_dim` is the
    dimension that tensor parallelism cuts, None for a replicated tensor.
    """

    neox: str
    hf: tuple[str, ...]
    shard_dim: int | None
    packing: Packing

    @property
    def replicated(self) -> bool:
        """Every tensor-parallel rank holds the whole tensor."""
        return self.packing is Packing.REPLICATED


@dataclass(frozen=True)
class Slice:
    """Rows `start:stop` (along `shard_dim`) of source number `source`; `source` None means zero padding rows."""

    source: int | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


_HF_LAYER = "model.layers.{layer}."

EMBEDDING = (TensorLayout("word_embeddings.weight", ("model.embed_tokens.weight",), 0, Packing.VOCAB),)
DECODER_LAYER = (
    TensorLayout("input_layernorm.scale", (_HF_LAYER + "input_layernorm.weight",), None, Packing.REPLICATED),
    TensorLayout(
        "attention.query_key_value.weight",
        tuple(_HF_LAYER + f"self_attn.{p}_proj.weight" for p in "qkv"),
        0,
        Packing.QKV,
    ),
    TensorLayout("attention.dense.weight", (_HF_LAYER + "self_attn.o_proj.weight",), 1, Packing.SPLIT),
    TensorLayout(
        "post_attention_layernorm.scale", (_HF_LAYER + "post_attention_layernorm.weight",), None, Packing.REPLICATED
    ),
    TensorLayout(
        "mlp.linear1.weight",
        (_HF_LAYER + "mlp.up_proj.weight", _HF_LAYER + "mlp.gate_proj.weight"),
        0,
        Packing.UP_GATE,
    ),
    TensorLayout("mlp.linear2.weight", (_HF_LAYER + "mlp.down_proj.weight",), 1, Packing.SPLIT),
)
FINAL_NORM = (TensorLayout("norm.scale", ("model.norm.weight",), None, Packing.REPLICATED),)
HEAD = (TensorLayout("final_linear.weight", ("lm_head.weight",), 0, Packing.VOCAB),)


EMBEDDING_INDEX = 0


def decoder_index(layer: int) -> int:
    """Layer-file number of decoder layer `layer` (0-based, as Hugging Face counts)."""
    return layer + 2


def final_norm_index(num_layers: int) -> int:
    return num_layers + 3


def head_index(num_layers: int) -> int:
    return num_layers + 4


def layer_files(shape: LlamaShape) -> Iterator[tuple[int, int | None, tuple[TensorLayout, ...]]]:
    """Every layer file that holds parameters: (file number, decoder layer or None, its rows of the table)."""
    yield EMBEDDING_INDEX, None, EMBEDDING
    for layer in range(shape.num_layers):
        yield decoder_index(layer), layer, DECODER_LAYER
    yield final_norm_index(shape.num_layers), None, FINAL_NORM
    if not shape.tied:
        yield head_index(shape.num_layers), None, HEAD


def rows_of(index: int, num_layers: int) -> tuple[TensorLayout, ...]:
    """The rows of the table that layer file `index` holds; none for the two transposes."""
    if index == EMBEDDING_INDEX:
        return EMBEDDING
    if decoder_index(0) <= index < decoder_index(num_layers):
        return DECODER_LAYER
    if index == final_norm_index(num_layers):
        return FINAL_NORM
    return HEAD if index == head_index(num_layers) else ()


def layer_file_name(index: int, tp_rank: int) -> str:
    return f"layer_{index:02d}-model_{tp_rank:02d}-model_states.pt"


def source_shapes(row: TensorLayout, shape: LlamaShape) -> tuple[tuple[int, ...], ...]:
    """Shape of each Hugging Face source of a row, unpadded, in packing order."""
    h, kv = shape.hidden_size, shape.num_kv_heads * shape.head_dim
    if row.packing is Packing.REPLICATED:
        return ((h,),)
    if row.packing is Packing.VOCAB:
        return ((shape.vocab_size, h),)
    if row.packing is Packing.QKV:
        return ((h, h), (kv, h), (kv, h))
    if row.packing is Packing.UP_GATE:
        return ((shape.intermediate_size, h),) * 2
    return ((h, h),) if row.neox == "attention.dense.weight" else ((h, shape.intermediate_size),)


def rank_shape(row: TensorLayout, shape: LlamaShape, tp: int) -> tuple[int, ...]:
    """Shape of the tensor that one of `tp` ranks stores."""
    if row.shard_dim is None:
        return (shape.hidden_size,)
    sources = source_shapes(row, shape)
    total = sum(s[row.shard_dim] for s in sources)
    if row.packing is Packing.VOCAB:
        total = shape.padded_vocab_size
    local = list(sources[0])
    local[row.shard_dim] = total // tp
    return tuple(local)


def rank_slices(row: TensorLayout, shape: LlamaShape, tp: int, tp_rank: int) -> list[Slice]:
    """What rank `tp_rank` of `tp` stores, as source slices to be concatenated in order along `shard_dim`.

    The inverse is the same list read the other way; nothing else is needed to convert, export or reshard.
    """
    sources = source_shapes(row, shape)
    if row.shard_dim is None:
        return [Slice(0, 0, sources[0][0])]
    if row.packing is Packing.VOCAB:
        local = shape.padded_vocab_size // tp
        start, stop = tp_rank * local, (tp_rank + 1) * local
        real_start, real_stop = min(start, shape.vocab_size), min(stop, shape.vocab_size)
        real = [Slice(0, real_start, real_stop)] if real_stop > real_start else []
        pad = (stop - start) - (real_stop - real_start)
        return real + ([Slice(None, 0, pad)] if pad else [])
    if row.packing is Packing.QKV and shape.multi_head:
        d, heads = shape.head_dim, shape.num_attention_heads // tp
        return [
            Slice(source, head * d, (head + 1) * d)
            for head in range(tp_rank * heads, (tp_rank + 1) * heads)
            for source in range(3)
        ]
    slices = []
    for source, source_shape in enumerate(sources):
        local = source_shape[row.shard_dim] // tp
        slices.append(Slice(source, tp_rank * local, (tp_rank + 1) * local))
    return slices


def split_qkv(mixed: Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a rank's fused projection output into q, k, v without a copy.

    `mixed` is [..., (heads + 2 kv_heads) head_dim] with the rank's own head counts; returns q [..., heads, head_dim]
    and k, v [..., kv_heads, head_dim] as views.
    """
    if heads == kv_heads:
        q, k, v = mixed.unflatten(-1, (heads, 3, head_dim)).unbind(-2)
        return q, k, v
    q, k, v = mixed.unflatten(-1, (heads + 2 * kv_heads, head_dim)).split((heads, kv_heads, kv_heads), dim=-2)
    return q, k, v


def split_up_gate(fused: Tensor) -> tuple[Tensor, Tensor]:
    """Split the output of `mlp.linear1`, [..., 2 F/tp], into up and gate, [..., F/tp] each, as views."""
    up, gate = fused.chunk(2, dim=-1)
    return up, gate
