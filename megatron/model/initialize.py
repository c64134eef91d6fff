"""Weights for a run that starts from scratch, the same for every TP x PP x DP split.

Each Hugging Face-shaped source tensor has its own random stream, keyed by (seed, layer file, tensor name), and a
rank takes its slices from it by the layout table. A model started at TP8 equals one started on a laptop.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron import layout
from megatron.neox_arguments import NeoXArgs

_RESIDUAL_OUTPUTS = {"attention.dense.weight", "mlp.linear2.weight"}


def standard_deviation(method: str, args: NeoXArgs) -> float:
    """Standard deviation of one of GPT-NeoX's initialisation methods."""
    if method == "normal":
        return args.init_method_std
    if method == "scaled_normal":
        return args.init_method_std / math.sqrt(2 * args.num_layers)
    if method == "small_init":
        return math.sqrt(2 / (5 * args.hidden_size))
    if method == "wang_init":
        return 2 / (args.num_layers * math.sqrt(args.hidden_size))
    raise ValueError(f"unknown init_method {method!r}; known: normal, scaled_normal, small_init, wang_init")


@torch.no_grad()
def initialise(layers: Iterable[tuple[int, nn.Module]], args: NeoXArgs, tp: int, tp_rank: int) -> None:
    """Fill the parameters of (layer file number, module) pairs: norms with one, matrices with scaled noise."""
    for index, module in layers:
        parameters = dict(module.named_parameters())
        for row in layout.rows_of(index, args.num_layers):
            parameter = parameters.pop(row.neox)
            if row.packing is layout.Packing.REPLICATED:
                parameter.fill_(1.0)
                continue
            method = args.output_layer_init_method if row.neox in _RESIDUAL_OUTPUTS else args.init_method
            parameter.copy_(_draw(row, index, standard_deviation(method, args), args, tp, tp_rank))
        if parameters:
            raise RuntimeError(
                f"layer {index} has parameters that the layout table does not know: {sorted(parameters)}"
            )


def _draw(row: layout.TensorLayout, index: int, std: float, args: NeoXArgs, tp: int, tp_rank: int) -> Tensor:
    """This rank's part of one tensor, fp32."""
    assert row.shard_dim is not None
    sources = []
    for name, shape in zip(row.hf, layout.source_shapes(row, args.shape), strict=True):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{args.seed}/{index}/{name}".encode()))
        sources.append(torch.empty(shape).normal_(0.0, std, generator=generator))
    pieces = []
    for piece in layout.rank_slices(row, args.shape, tp, tp_rank):
        if piece.source is None:
            pieces.append(sources[0].new_zeros(len(piece), args.hidden_size))
        else:
            pieces.append(sources[piece.source].narrow(row.shard_dim, piece.start, len(piece)))
    return torch.cat(pieces, dim=row.shard_dim)
