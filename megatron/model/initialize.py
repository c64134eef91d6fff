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
def initialize_layers(layers: Iterable[tuple[int, nn.Module]], args: NeoXArgs, tp: int, tp_rank: int) -> None:
    """Fill the parameters of (layer file number, module) pairs, each as its row of the layout table says.

    Raises RuntimeError if a module's parameters are not the table's.
    """
    methods = {
        layout.Initialization.NORMAL: args.init_method,
        layout.Initialization.RESIDUAL_OUTPUT: args.output_layer_init_method,
    }
    for index, module in layers:
        parameters = dict(module.named_parameters())
        rows = {row.neox: row for row in layout.rows_of(index, args.shape)}
        if parameters.keys() != rows.keys():
            raise RuntimeError(
                f"layer {index} and the layout table have different parameters: "
                f"{', '.join(sorted(parameters.keys() ^ rows.keys()))}"
            )
        for name, row in rows.items():
            if row.initialization is layout.Initialization.ONES:
                parameters[name].fill_(1.0)
            elif row.initialization is layout.Initialization.ZEROS:
                parameters[name].zero_()
            else:
                std = standard_deviation(methods[row.initialization], args)
                parameters[name].copy_(_draw(row, index, std, args, tp, tp_rank))


def _draw(row: layout.TensorRow, index: int, std: float, args: NeoXArgs, tp: int, tp_rank: int) -> Tensor:
    """This rank's part of one tensor, fp32."""
    sources = []
    for name, shape in zip(row.hf, layout.source_shapes(row, args.shape), strict=True):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{args.seed}/{index}/{name}".encode()))
        sources.append(torch.empty(shape).normal_(0.0, std, generator=generator))
    dim = row.shard_dim or 0
    pieces = []
    for piece in layout.rank_slices(row, args.shape, tp, tp_rank):
        if piece.source is None:  # padding rows of the vocabulary
            pieces.append(sources[0].new_zeros(len(piece), *sources[0].shape[1:]))
        else:
            pieces.append(sources[piece.source].narrow(dim, piece.start, len(piece)))
    return torch.cat(pieces, dim=dim)
