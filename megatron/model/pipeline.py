"""The decoder as a list of numbered layers, which an engine splits into pipeline stages.

Layer numbers are the checkpoint's: 0 embedding, 1 and L+2 transposes, 2..L+1 decoder layers, L+3 norm, L+4 head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.model.llama import Embedding, FinalNorm, Head, TransformerLayer, batch_first, sequence_first
from megatron.model.loss import GlobalMeanLoss
from megatron.model.parallel import TensorParallel
from megatron.model.patches import GlobalMeanHuber, PatchEmbedding, PatchHead, PatchScale
from megatron.model.rotary import RotaryTable
from megatron.neox_arguments import NeoXArgs

PARAMETER_DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Layer:
    """One entry of the decoder: a module class to build, or a function without parameters."""

    build: type[nn.Module] | None
    arguments: tuple[Any, ...] = ()
    function: Callable[..., Any] | None = None  # applied to the input, or for `shares` to (module, input)
    shares: str | None = None  # layers with the same key hold one module


def training_loss(args: NeoXArgs, tp: TensorParallel) -> Callable[[Tensor, Any], Tensor]:
    """The loss function: (last layer's output, targets of a micro-batch) -> its share of the global mean loss."""
    if args.patches is not None:
        return GlobalMeanHuber(tp, PatchScale(args.patches))
    return GlobalMeanLoss(tp.group, args.vocab_size)


def llama_layers(args: NeoXArgs, tp: TensorParallel) -> list[Layer]:
    """All layers of the model in order; the index in the list is the layer's number in the checkpoint."""
    positions = tp.padded_length(args.seq_length)
    rotary = RotaryTable(args.head_dim, args.rotary_emb_base, args.rope_scaling, positions)
    tied = "embedding" if args.shape.tied else None
    images = args.patches is not None
    return [
        Layer(PatchEmbedding, (args, tp)) if images else Layer(Embedding, (args, tp), shares=tied),
        Layer(None, function=sequence_first),
        *(Layer(TransformerLayer, (args, tp, rotary)) for _ in range(args.num_layers)),
        Layer(None, function=batch_first),
        Layer(FinalNorm, (args, tp)),
        Layer(Embedding, (args, tp), function=partial(_tied_head, tp), shares=tied)
        if tied
        else Layer(PatchHead if images else Head, (args, tp)),
    ]


def _tied_head(tp: TensorParallel, embedding: Embedding, x: Tensor) -> Tensor:
    return tp.tied_logits(x, embedding.word_embeddings)
