"""Names, shapes and packings of every tensor on disk: the base layer, standard library only.

`row` describes one tensor, `table` has the rows and the files that hold them, `shape` the sizes of a model, `packing`
what each tensor-parallel rank stores, `ranges` where its elements are at another tensor-parallel size. Nothing here
imports torch or any other package of this project, so it can be used on a login node.
"""

from megatron.layout.adapter import (
    FACTOR_A,
    FACTOR_B,
    PEFT_PREFIX,
    PROJECTIONS,
    adapted,
    adapter_alone,
    factor_rows,
    in_table_order,
    is_factor,
    peft_name,
    projection_of,
    trained_rows,
)
from megatron.layout.packing import (
    Slice,
    join_qkv,
    join_up_gate,
    rank_shape,
    rank_slices,
    source_shapes,
    split_qkv,
    split_up_gate,
)
from megatron.layout.patches import PatchShape, recorded_shape
from megatron.layout.ranges import TensorRange, TensorSplit, Transfer, transfers
from megatron.layout.row import PATCHES, TEXT, Initialization, LayerFile, Packing, TensorRow
from megatron.layout.shape import LlamaShape, padded_vocab_size
from megatron.layout.table import (
    DECODER_LAYER,
    EMBEDDING,
    EMBEDDING_INDEX,
    FINAL_NORM,
    HEAD,
    TABLE,
    decoder_index,
    file_indices,
    file_rows,
    final_norm_index,
    head_index,
    layer_file_name,
    layer_files,
    row_of,
    rows_of,
)

__all__ = [
    "DECODER_LAYER",
    "EMBEDDING",
    "EMBEDDING_INDEX",
    "FACTOR_A",
    "FACTOR_B",
    "FINAL_NORM",
    "HEAD",
    "PATCHES",
    "PEFT_PREFIX",
    "PROJECTIONS",
    "TABLE",
    "TEXT",
    "Initialization",
    "LayerFile",
    "LlamaShape",
    "Packing",
    "PatchShape",
    "Slice",
    "TensorRange",
    "TensorRow",
    "TensorSplit",
    "Transfer",
    "adapted",
    "adapter_alone",
    "decoder_index",
    "factor_rows",
    "file_indices",
    "file_rows",
    "final_norm_index",
    "head_index",
    "in_table_order",
    "is_factor",
    "join_qkv",
    "join_up_gate",
    "layer_file_name",
    "layer_files",
    "padded_vocab_size",
    "peft_name",
    "projection_of",
    "rank_shape",
    "rank_slices",
    "recorded_shape",
    "row_of",
    "rows_of",
    "source_shapes",
    "split_qkv",
    "split_up_gate",
    "trained_rows",
    "transfers",
]
