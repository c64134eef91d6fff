"""`log_param_norm`: the norm of every parameter, whatever the layout."""

from __future__ import annotations

import torch.distributed as dist

from megatron import layout
from megatron.engine.protocol import Engine
from megatron.layout import LlamaShape


def parameter_norms(engine: Engine, shape: LlamaShape) -> dict[str, float]:
    """L2 norms by `parameter_norms/LAYER.NAME` (LAYER is the number of the layer's file). Collective over all ranks."""
    place = engine.place
    own: dict[str, float] = {}
    if place.dp_rank == 0:
        for index, layer in engine.numbered_layers():
            for name, parameter in layer.named_parameters():
                if place.tp_rank == 0 or not layout.row_of(index, name, shape).replicated:
                    own[f"parameter_norms/{index}.{name}"] = float(parameter.detach().float().square().sum())
    parts: list[dict[str, float]] = [{} for _ in range(place.world_size)]
    dist.all_gather_object(parts, own)
    squares: dict[str, float] = {}
    for part in parts:
        for name, square in part.items():
            squares[name] = squares.get(name, 0.0) + square
    return {name: square**0.5 for name, square in squares.items()}
