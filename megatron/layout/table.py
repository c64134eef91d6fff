"""The one table of Llama tensors: NeoX name, Hugging Face sources, shard dimension, packing, file, modality.

The model splits its fused projections with it, the converter plans byte ranges from it, checkpoints are checked
against it, and the planner uses it. Nothing else in this project knows a packing order, so model and converter cannot
diverge (gpt-neox #1337: each had its own convention, one of them changed, and a 70B run started at a loss of 12).
Whether a tensor is replicated, decays, and how it is initialized is read from its row, never guessed from its
dimensions: a bias is a vector and may be split, an adapter's matrix may be replicated.

A shape names its table (`LlamaShape.table`), so that any code given a shape uses the right table.

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
from typing import TYPE_CHECKING

from megatron.layout.row import TEXT, Initialization, LayerFile, Packing, TensorRow

if TYPE_CHECKING:
    from megatron.layout.shape import LlamaShape

_HF_LAYER = "model.layers.{layer}."


def _norm(neox: str, hf: str, file: LayerFile) -> TensorRow:
    return TensorRow(
        neox=neox,
        hf=(hf,),
        sizes=(("hidden_size",),),
        packing=Packing.REPLICATED,
        file=file,
        initialization=Initialization.ONES,
        decays=False,
    )


def _vocabulary(neox: str, hf: str, file: LayerFile) -> TensorRow:
    return TensorRow(
        neox=neox,
        hf=(hf,),
        sizes=(("vocab_size", "hidden_size"),),
        packing=Packing.VOCAB,
        shard_dim=0,
        file=file,
        modality=TEXT,
        initialization=Initialization.NORMAL,
        decays=True,
    )


EMBEDDING = (_vocabulary("word_embeddings.weight", "model.embed_tokens.weight", LayerFile.EMBEDDING),)
DECODER_LAYER = (
    _norm("input_layernorm.scale", _HF_LAYER + "input_layernorm.weight", LayerFile.DECODER),
    TensorRow(
        neox="attention.query_key_value.weight",
        hf=tuple(_HF_LAYER + f"self_attn.{p}_proj.weight" for p in "qkv"),
        sizes=(("hidden_size", "hidden_size"), ("kv_size", "hidden_size"), ("kv_size", "hidden_size")),
        packing=Packing.QKV,
        shard_dim=0,
        file=LayerFile.DECODER,
        initialization=Initialization.NORMAL,
        decays=True,
    ),
    TensorRow(
        neox="attention.dense.weight",
        hf=(_HF_LAYER + "self_attn.o_proj.weight",),
        sizes=(("hidden_size", "hidden_size"),),
        packing=Packing.SPLIT,
        shard_dim=1,
        file=LayerFile.DECODER,
        initialization=Initialization.RESIDUAL_OUTPUT,
        decays=True,
    ),
    _norm("post_attention_layernorm.scale", _HF_LAYER + "post_attention_layernorm.weight", LayerFile.DECODER),
    TensorRow(
        neox="mlp.linear1.weight",
        hf=(_HF_LAYER + "mlp.up_proj.weight", _HF_LAYER + "mlp.gate_proj.weight"),
        sizes=(("intermediate_size", "hidden_size"),) * 2,
        packing=Packing.UP_GATE,
        shard_dim=0,
        file=LayerFile.DECODER,
        initialization=Initialization.NORMAL,
        decays=True,
    ),
    TensorRow(
        neox="mlp.linear2.weight",
        hf=(_HF_LAYER + "mlp.down_proj.weight",),
        sizes=(("hidden_size", "intermediate_size"),),
        packing=Packing.SPLIT,
        shard_dim=1,
        file=LayerFile.DECODER,
        initialization=Initialization.RESIDUAL_OUTPUT,
        decays=True,
    ),
)
FINAL_NORM = (_norm("norm.scale", "model.norm.weight", LayerFile.FINAL_NORM),)
HEAD = (_vocabulary("final_linear.weight", "lm_head.weight", LayerFile.HEAD),)

TABLE = (*EMBEDDING, *DECODER_LAYER, *FINAL_NORM, *HEAD)

EMBEDDING_INDEX = 0


def decoder_index(layer: int) -> int:
    """Layer-file number of decoder layer `layer` (0-based, as Hugging Face counts)."""
    return layer + 2


def final_norm_index(num_layers: int) -> int:
    return num_layers + 3


def head_index(num_layers: int) -> int:
    return num_layers + 4


def file_indices(file: LayerFile, num_layers: int) -> range:
    """The numbers of all layer files of a kind."""
    if file is LayerFile.DECODER:
        return range(decoder_index(0), decoder_index(num_layers))
    start = {
        LayerFile.EMBEDDING: EMBEDDING_INDEX,
        LayerFile.FINAL_NORM: final_norm_index(num_layers),
        LayerFile.HEAD: head_index(num_layers),
    }[file]
    return range(start, start + 1)


def layer_file_name(index: int, tp_rank: int) -> str:
    return f"layer_{index:02d}-model_{tp_rank:02d}-model_states.pt"


def file_rows(file: LayerFile, shape: LlamaShape) -> tuple[TensorRow, ...]:
    """The rows of the shape's table that each layer file of a kind holds; none for the head of a tied model."""
    if file is LayerFile.HEAD and shape.tied:
        return ()
    return tuple(row for row in shape.table if row.file is file and shape.holds(row))


def layer_files(shape: LlamaShape) -> Iterator[tuple[int, int | None, tuple[TensorRow, ...]]]:
    """Every layer file that holds parameters: (file number, decoder layer or None, its rows of the table)."""
    for file in LayerFile:
        rows = file_rows(file, shape)
        for layer, index in enumerate(file_indices(file, shape.num_layers)):
            if rows:
                yield index, layer if file is LayerFile.DECODER else None, rows


def rows_of(index: int, shape: LlamaShape) -> tuple[TensorRow, ...]:
    """The rows of the table that layer file `index` holds; none for the two transposes."""
    for file in LayerFile:
        if index in file_indices(file, shape.num_layers):
            return file_rows(file, shape)
    return ()


def row_of(index: int, name: str, shape: LlamaShape) -> TensorRow:
    """The row of tensor `name` of layer file `index`; LookupError if the table has none."""
    for row in rows_of(index, shape):
        if row.neox == name:
            return row
    raise LookupError(f"the layout table has no tensor {name} in layer {index} of {shape.num_layers} decoder layers")
