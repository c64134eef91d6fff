"""Weights for a run that starts from scratch, the same for every TP x PP x DP split.

Each Hugging Face-shaped source tensor has its own random stream, keyed by (seed, layer file, tensor name), and each
rank slices it according to the layout table. A model initialized at TP8 equals one initialized on a laptop.
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
    """Standard deviation of one of GPT-NeoX's initialization methods."""
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
    """Initialize the parameters of (layer file number, module) pairs as their rows of the layout table specify.

    Raises RuntimeError if a module's parameters are not those of the table.
    """
    for index, module in layers:
        parameters = dict(module.named_parameters())
        rows = layout.rows_of(index, args.whole_shape)
        names = {row.neox for row in rows}
        if parameters.keys() != names:
            raise RuntimeError(
                f"layer {index} and the layout table have different parameters: "
                f"{', '.join(sorted(parameters.keys() ^ names))}"
            )
        _fill(index, parameters, rows, args, tp, tp_rank)


@torch.no_grad()
def initialize_adapters(layers: Iterable[tuple[int, nn.Module]], args: NeoXArgs, tp: int, tp_rank: int) -> None:
    """Initialize only the adapters' factors: A random and B zero, so that training starts from the base's outputs."""
    for index, module in layers:
        rows = [row for row in layout.rows_of(index, args.whole_shape) if layout.is_factor(row.neox)]
        _fill(index, dict(module.named_parameters()), rows, args, tp, tp_rank)


def _fill(
    index: int,
    parameters: dict[str, nn.Parameter],
    rows: Iterable[layout.TensorRow],
    args: NeoXArgs,
    tp: int,
    tp_rank: int,
) -> None:
    methods = {
        layout.Initialization.NORMAL: args.init_method,
        layout.Initialization.RESIDUAL_OUTPUT: args.output_layer_init_method,
    }
    for row in rows:
        parameter = parameters[row.neox]
        if row.initialization is layout.Initialization.ONES:
            parameter.fill_(1.0)
        elif row.initialization is layout.Initialization.ZEROS:
            parameter.zero_()
        elif row.initialization is layout.Initialization.UNIFORM:
            parameter.copy_(_draw(row, index, None, args, tp, tp_rank))
        else:
            std = standard_deviation(methods[row.initialization], args)
            parameter.copy_(_draw(row, index, std, args, tp, tp_rank))


def _draw(row: layout.TensorRow, index: int, std: float | None, args: NeoXArgs, tp: int, tp_rank: int) -> Tensor:
    """This rank's shard of one tensor, fp32: normal with deviation `std`; None: uniform, as for an adapter's A."""
    sources = []
    for name, shape in zip(row.hf, layout.source_shapes(row, args.whole_shape), strict=True):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{args.seed}/{index}/{name}".encode()))
        values = torch.empty(shape)
        if std is None:
            bound = 1 / math.sqrt(shape[1])
            sources.append(values.uniform_(-bound, bound, generator=generator))
        else:
            sources.append(values.normal_(0.0, std, generator=generator))
    dim = row.shard_dim or 0
    pieces = []
    for piece in layout.rank_slices(row, args.whole_shape, tp, tp_rank):
        if piece.source is None:  # padding rows of the vocabulary
            pieces.append(sources[0].new_zeros(len(piece), *sources[0].shape[1:]))
        else:
            pieces.append(sources[piece.source].narrow(dim, piece.start, len(piece)))
    return torch.cat(pieces, dim=dim)
