"""Table rows of no real model: a replicated matrix, a sharded vector, another modality's first and last layer."""

from __future__ import annotations

from dataclasses import replace

from megatron.layout import DECODER_LAYER, TABLE, Initialization, LayerFile, LlamaShape, Packing, TensorRow

RANK = 3
CHANNELS = 12

_QKV = next(row for row in DECODER_LAYER if row.packing is Packing.QKV)
_DOWN = next(row for row in DECODER_LAYER if row.neox == "mlp.linear2.weight")

REPLICATED_MATRIX = replace(_QKV.low_rank_factor(0, 1, RANK, "lora_A", Initialization.NORMAL), decays=False)
CUT_FACTOR = replace(_QKV.low_rank_factor(0, 0, RANK, "lora_B", Initialization.ZEROS), decays=False)
CUT_BY_COLUMNS = replace(_DOWN.low_rank_factor(0, 1, RANK, "lora_A", Initialization.NORMAL), decays=False)
CUT_VECTOR = TensorRow(
    neox="mlp.linear1.bias",
    hf=("model.layers.{layer}.mlp.up_proj.bias", "model.layers.{layer}.mlp.gate_proj.bias"),
    sizes=(("intermediate_size",), ("intermediate_size",)),
    packing=Packing.UP_GATE,
    shard_dim=0,
    file=LayerFile.DECODER,
    initialization=Initialization.NORMAL,
    decays=False,
)
IN_DECODER = (REPLICATED_MATRIX, CUT_FACTOR, CUT_BY_COLUMNS, CUT_VECTOR)

SPECTRA = "spectra"
PROJECTION = TensorRow(
    neox="projection.weight",
    hf=("spectra.embed.weight",),
    sizes=(("hidden_size", CHANNELS),),
    packing=Packing.REPLICATED,
    file=LayerFile.EMBEDDING,
    modality=SPECTRA,
    initialization=Initialization.NORMAL,
    decays=True,
)
OUTPUT_BIAS = TensorRow(
    neox="output.bias",
    hf=("spectra.head.bias",),
    sizes=((CHANNELS,),),
    packing=Packing.SPLIT,
    shard_dim=0,
    file=LayerFile.HEAD,
    modality=SPECTRA,
    initialization=Initialization.ZEROS,
    decays=False,
)


class AdaptedShape(LlamaShape):
    """A Llama with additional tensors in its decoder layers."""

    table = (*TABLE, *IN_DECODER)


class SpectraShape(LlamaShape):
    """The same decoder layers between another modality's first and last layer."""

    table = (*TABLE, PROJECTION, OUTPUT_BIAS)
    modality = SPECTRA
