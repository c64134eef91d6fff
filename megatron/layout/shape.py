"""The sizes of a Llama, from which the layout table gives every tensor its shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from megatron.layout.packing import rank_shape
from megatron.layout.row import TEXT, LayerFile, TensorRow
from megatron.layout.table import TABLE, file_indices, file_rows


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that fix every tensor of a Llama; `vocab_size` is the true one, `padded_vocab_size` the stored one.

    `table` and `modality` say which tensors these are, `frozen_base` which of them are trained. They belong to the
    class and are not recorded in manifests: a model with other tensors is a subclass with its own.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool

    table: ClassVar[tuple[TensorRow, ...]] = TABLE
    modality: ClassVar[str] = TEXT
    frozen_base: ClassVar[bool] = False  # only the factors of an adapter are trained

    def holds(self, row: TensorRow) -> bool:
        """Whether a model of this shape has the tensor of a row of its table."""
        return row.modality in (None, self.modality)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def multi_head(self) -> bool:
        """Every query head has its own key and value head; GPT-NeoX then packs rows head by head."""
        return self.num_kv_heads == self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the stored model, padding included, replicated tensors counted once."""
        return sum(
            len(file_indices(file, self.num_layers)) * prod(rank_shape(row, self, tp=1))
            for file in LayerFile
            for row in file_rows(file, self)
        )

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
