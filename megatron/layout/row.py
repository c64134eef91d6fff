"""The layout table's description of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Size = (
    Literal[
        "hidden_size",
        "kv_size",
        "intermediate_size",
        "vocab_size",
        "patch_values",
        "patch_hidden_size",
        "num_positions",
    ]
    | int
)
"""A dimension of a tensor: a size of the shape by name, or a number that is the same for every model."""


class LayerFile(Enum):
    """The kinds of layer files that hold parameters; the decoder has one file per layer."""

    EMBEDDING = "embedding"
    DECODER = "decoder"
    FINAL_NORM = "final_norm"
    HEAD = "head"


class Packing(Enum):
    """How the rows (or columns) of the source tensors are distributed over the tensor-parallel ranks."""

    REPLICATED = "replicated"  # one source, and every rank holds the whole of it
    SPLIT = "split"  # one source, contiguous equal chunks
    VOCAB = "vocab"  # one source, padded at the end, contiguous equal chunks
    QKV = "qkv"  # q, k, v by whole heads
    UP_GATE = "up_gate"  # one chunk of up, then one chunk of gate


class Initialization(Enum):
    """The initial values of a tensor in a from-scratch run."""

    ONES = "ones"
    ZEROS = "zeros"
    NORMAL = "normal"  # noise, scaled by `init_method`
    UNIFORM = "uniform"  # of a matrix [out, in], between -1 / sqrt(in) and 1 / sqrt(in)
    RESIDUAL_OUTPUT = "residual_output"  # noise of a matrix that adds to the residual: `output_layer_init_method`


TEXT, PATCHES = "text", "patches"


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One row of the table: a tensor of a NeoX layer file and the Hugging Face tensors it is made of.

    `hf` holds one name per source, in packing order, with `{layer}` for the decoder layer, and `sizes` the shape of
    each of them, unpadded. `shard_dim` is the dimension that tensor parallelism cuts. `modality` is that of the models
    which hold the tensor, None for all of them. `decays`: weight decay applies.
    """

    neox: str
    hf: tuple[str, ...]
    sizes: tuple[tuple[Size, ...], ...]
    packing: Packing
    shard_dim: int | None = None
    file: LayerFile
    modality: str | None = None
    initialization: Initialization
    decays: bool

    def __post_init__(self) -> None:
        if len(self.hf) != len(self.sizes) or not self.hf:
            raise ValueError(f"{self.neox}: {len(self.hf)} sources, but {len(self.sizes)} shapes")
        if self.replicated and len(self.hf) > 1:
            raise ValueError(f"{self.neox}: a replicated tensor has one source, not {len(self.hf)}")
        if self.replicated != (self.shard_dim is None):
            raise ValueError(f"{self.neox}: packing {self.packing.value}, but shard_dim {self.shard_dim}")

    @property
    def replicated(self) -> bool:
        """Every tensor-parallel rank holds the whole tensor: copies, which must stay bit-equal and count once."""
        return self.packing is Packing.REPLICATED

    def low_rank_factor(
        self, source: int, keeps: Literal[0, 1], rank: Size, name: str, initialization: Initialization
    ) -> TensorRow:
        """The row of one of the two matrices whose product an adapter adds to source number `source`.

        For a source [out, in], it is [out, rank] if it keeps dimension 0 and [rank, in] if it keeps dimension 1. It is
        sharded like the source if that is sharded along the kept dimension, else replicated. Its name is the source's
        with `name` inserted before the last part. Weight decay applies to it, as to any matrix.
        """
        base = self.sizes[source]
        if len(base) != 2:
            raise ValueError(f"{self.hf[source]} is not a matrix, and has no low-rank factors")
        packing, shard_dim = Packing.REPLICATED, None
        if self.shard_dim == keeps:
            packing, shard_dim = Packing.VOCAB if self.packing is Packing.VOCAB else Packing.SPLIT, self.shard_dim
        module, end = self.hf[source].rsplit(".", 1)
        fused, _ = self.neox.rsplit(".", 1)
        return TensorRow(
            neox=f"{fused}.{module.rsplit('.', 1)[-1]}.{name}.{end}",
            hf=(f"{module}.{name}.{end}",),
            sizes=((base[0], rank) if keeps == 0 else (rank, base[1]),),
            packing=packing,
            shard_dim=shard_dim,
            file=self.file,
            modality=self.modality,
            initialization=initialization,
            decays=True,
        )
