"""The tensors of a model of image patches: those of a Llama, with a patch embedding and a patch head at its ends.

- layer file 0: `project.weight` (tokenizer affine), or `linear1.weight` and `linear2.weight` (tokenizer mlp), and with
  learned positions `position_embeddings.weight`;
- layer file L+4: the same two kinds for the head.

The matrices of an MLP are sharded over tensor-parallel ranks like the decoder's; affine matrices and positions are
replicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.layout.row import PATCHES, Initialization, LayerFile, Packing, Size, TensorRow
from megatron.layout.shape import LlamaShape
from megatron.layout.table import DECODER_LAYER, FINAL_NORM

AFFINE, MLP = "affine", "mlp"
MLP_FACTOR = 4  # the inner width of the patch tokenizer's MLP over hidden_size


def _matrix(file: LayerFile, name: str, sizes: tuple[Size, Size], shard_dim: int | None) -> TensorRow:
    place = {LayerFile.EMBEDDING: "embed.", LayerFile.HEAD: "head."}[file]
    return TensorRow(
        neox=f"{name}.weight",
        hf=(f"patches.{place}{name}.weight",),
        sizes=(sizes,),
        packing=Packing.REPLICATED if shard_dim is None else Packing.SPLIT,
        shard_dim=shard_dim,
        file=file,
        modality=PATCHES,
        initialization=Initialization.NORMAL,
        decays=True,
    )


PATCH_POSITIONS = _matrix(LayerFile.EMBEDDING, "position_embeddings", ("num_positions", "hidden_size"), None)
PATCH_EMBEDDING = {
    AFFINE: (_matrix(LayerFile.EMBEDDING, "project", ("hidden_size", "patch_values"), None),),
    MLP: (
        _matrix(LayerFile.EMBEDDING, "linear1", ("patch_hidden_size", "patch_values"), 0),
        _matrix(LayerFile.EMBEDDING, "linear2", ("hidden_size", "patch_hidden_size"), 1),
    ),
}
PATCH_HEAD = {
    AFFINE: (_matrix(LayerFile.HEAD, "project", ("patch_values", "hidden_size"), None),),
    MLP: (
        _matrix(LayerFile.HEAD, "linear1", ("patch_hidden_size", "hidden_size"), 0),
        _matrix(LayerFile.HEAD, "linear2", ("patch_values", "patch_hidden_size"), 1),
    ),
}
PATCH_TABLE = (
    *PATCH_EMBEDDING[AFFINE],
    *PATCH_EMBEDDING[MLP],
    PATCH_POSITIONS,
    *DECODER_LAYER,
    *FINAL_NORM,
    *PATCH_HEAD[AFFINE],
    *PATCH_HEAD[MLP],
)


@dataclass(frozen=True)
class PatchShape(LlamaShape):
    """The sizes of a Llama on image patches. It has no vocabulary: the inherited vocabulary sizes are 0.

    `patch_values` are the numbers in a patch (side x side x bands), `tokenizer` is affine or mlp, `num_positions` the
    rows of the learned positions, 0 without them.
    """

    patch_values: int
    tokenizer: str
    num_positions: int

    table: ClassVar[tuple[TensorRow, ...]] = PATCH_TABLE
    modality: ClassVar[str] = PATCHES

    @classmethod
    def of(
        cls, decoder: Mapping[str, int], *, size: int, channels: int, tokenizer: str, positions: str, max_positions: int
    ) -> PatchShape:
        """From the sizes of the decoder and what the mapping `patches` says; `positions` is none or learned."""
        return cls(
            **decoder,
            vocab_size=0,
            padded_vocab_size=0,
            tied=False,
            patch_values=size**2 * channels,
            tokenizer=tokenizer,
            num_positions=max_positions if positions == "learned" else 0,
        )

    @property
    def patch_hidden_size(self) -> int:
        """Inner width of the patch tokenizer's MLP, and of the head's."""
        return MLP_FACTOR * self.hidden_size

    @property
    def patch_end_weights(self) -> int:
        """Elements of the matrices of embedding and head."""
        if self.tokenizer == AFFINE:
            return 2 * self.patch_values * self.hidden_size
        return 2 * self.patch_hidden_size * (self.patch_values + self.hidden_size)

    def holds(self, row: TensorRow) -> bool:
        if row.modality != PATCHES:
            return super().holds(row)
        if row is PATCH_POSITIONS:
            return self.num_positions > 0
        return row in PATCH_EMBEDDING[self.tokenizer] or row in PATCH_HEAD[self.tokenizer]


def recorded_shape(fields: Mapping[str, Any]) -> LlamaShape:
    """The shape whose fields a manifest records (`dataclasses.asdict`). TypeError if they do not fit one."""
    return (PatchShape if "patch_values" in fields else LlamaShape)(**fields)
