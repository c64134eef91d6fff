"""The stages that a run would really have: the trainer's own model, built without memory and without other ranks.

Torch's "fake" process group stands in for the world at its true size, the "meta" device for the weights. One rank of
every stage is built, and on the first and the last stage its neighbour at the other end of the tensor-parallel group,
which must hold the same shapes. Tensors are compared with the layout table on the way.

Importing this module imports torch, DeepSpeed and megatron-core: seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron import layout
from megatron.engine.deepspeed import build_model
from megatron.model.pipeline import LlamaPipelineModule, topology
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.process_groups import form_groups


class StageMismatchError(RuntimeError):
    """The model that was built is not the one that the layout table describes."""


@dataclass(frozen=True)
class Stage:
    layers: range  # layer-file numbers
    parameters: int  # elements on one rank
    parameters_total: int  # over its tensor-parallel ranks; replicated ones and a tied head's copy counted once


def true_stages(args: NeoXArgs) -> list[Stage]:
    """Every pipeline stage of a resolved configuration, first to last.

    Must be called outside of any process group; leaves none behind. Raises StageMismatchError if a parameter's shape
    is not the layout table's.
    """
    return [_stage(args, stage) for stage in range(args.pipe_parallel_size)]


def _stage(args: NeoXArgs, stage: int) -> Stage:
    tp = args.model_parallel_size
    with _rank(args, stage, tensor=0):
        model = build_model(args, torch.device("meta"))
        shapes = _shapes(model)
        found = Stage(
            layers=model.stage_layers(stage),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            parameters_total=_whole(args, shapes, stage),
        )
    if tp > 1 and stage in (0, args.pipe_parallel_size - 1):
        with _rank(args, stage, tensor=tp - 1):
            if _shapes(build_model(args, torch.device("meta"))) != shapes:
                raise StageMismatchError(f"stage {stage}: tensor-parallel ranks 0 and {tp - 1} hold different shapes")
    return found


def _shapes(model: LlamaPipelineModule) -> dict[tuple[int, str], torch.Size]:
    return {
        (index, name): parameter.shape
        for index, layer in model.numbered_layers()
        for name, parameter in layer.named_parameters()
    }


def _whole(args: NeoXArgs, shapes: dict[tuple[int, str], torch.Size], stage: int) -> int:
    total = 0
    for (index, name), shape in shapes.items():
        # the last stage's copy of a tied embedding stands where another model has its head
        copy = args.shape.tied and index == layout.head_index(args.num_layers)
        rows = layout.EMBEDDING if copy else layout.rows_of(index, args.shape)
        row = next((row for row in rows if row.neox == name), None)
        expected = row and layout.rank_shape(row, args.shape, args.model_parallel_size)
        if row is None or shape != expected:
            raise StageMismatchError(f"stage {stage}, layer {index}: {name} is {tuple(shape)}, not {expected}")
        total += 0 if copy else shape.numel() * (1 if row.replicated else args.model_parallel_size)
    return total


@contextmanager
def _rank(args: NeoXArgs, stage: int, tensor: int) -> Iterator[None]:
    """This process as one rank of the whole world, which answers every collective at once."""
    rank = topology(args).get_rank(pipe=stage, data=0, model=tensor)
    excepthook = sys.excepthook  # torch's would put this rank's number before every line of a traceback
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.global_num_gpus)
    local_rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed's pipeline module reads it
    try:
        form_groups(args)
        yield
    finally:
        if local_rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = local_rank
        sys.excepthook = excepthook
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
