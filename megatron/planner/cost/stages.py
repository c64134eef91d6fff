"""The actual stages of a run: the trainer's own model, built without memory and without other ranks.

Torch's "fake" process group stands in for the other ranks, the "meta" device for the weights. One rank of every stage
is built, and on the first and the last stage also the rank at the other end of the tensor-parallel group, which must
hold the same shapes. The first is built in a world of the run's true size, the others with one data-parallel replica: a
stage is the same in all of them, and forming the groups of thousands of ranks takes seconds. Tensors are compared with
the layout table on the way.

Importing this module imports torch, DeepSpeed and megatron-core: seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron import layout
from megatron.engine.build import build_stage
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place
from megatron.parallel.process_groups import form_groups


class StageMismatchError(RuntimeError):
    """The model that was built is not the one that the layout table describes."""


@dataclass(frozen=True)
class Stage:
    chunks: tuple[range, ...]  # layer-file numbers, one run for each virtual stage
    parameters: int  # elements on one rank
    parameters_total: int  # over its tensor-parallel ranks; replicated ones and a tied head's copy counted once


def true_stages(args: NeoXArgs) -> list[Stage]:
    """Every pipeline stage of a resolved configuration, first to last.

    Must be called outside any process group; leaves none behind. Raises StageMismatchError if a parameter's shape
    differs from the layout table.
    """
    replica = args.model_copy(update={"global_num_gpus": args.model_parallel_size * args.pipe_parallel_size})
    return [_stage(args, 0), *(_stage(replica, stage) for stage in range(1, args.pipe_parallel_size))]


def _stage(args: NeoXArgs, stage: int) -> Stage:
    tp = args.model_parallel_size
    with _rank(args, stage, tensor=0) as place:
        model = build_stage(args, place)
        shapes, copies = _shapes(model.numbered_layers()), _shapes(model.tied_copies())
        found = Stage(
            chunks=tuple(model.stage_layers(stage, number) for number in range(args.virtual_pipe_parallel_size)),
            parameters=sum(shape.numel() for shape in [*shapes.values(), *copies.values()]),
            parameters_total=_whole(args, shapes, stage),
        )
    if tp > 1 and stage in (0, args.pipe_parallel_size - 1):
        with _rank(args, stage, tensor=tp - 1) as place:
            if _shapes(build_stage(args, place).numbered_layers()) != shapes:
                raise StageMismatchError(f"stage {stage}: tensor-parallel ranks 0 and {tp - 1} hold different shapes")
    return found


def _shapes(layers: Iterable[tuple[int, nn.Module]]) -> dict[tuple[int, str], torch.Size]:
    return {(index, name): parameter.shape for index, layer in layers for name, parameter in layer.named_parameters()}


def _whole(args: NeoXArgs, shapes: dict[tuple[int, str], torch.Size], stage: int) -> int:
    total = 0
    for (index, name), shape in shapes.items():
        row = next((row for row in layout.rows_of(index, args.whole_shape) if row.neox == name), None)
        expected = row and layout.rank_shape(row, args.whole_shape, args.model_parallel_size)
        if row is None or shape != expected:
            raise StageMismatchError(f"stage {stage}, layer {index}: {name} is {tuple(shape)}, not {expected}")
        total += shape.numel() * (1 if row.replicated else args.model_parallel_size)
    return total


@contextmanager
def _rank(args: NeoXArgs, stage: int, tensor: int) -> Iterator[Place]:
    """Make this process one rank of a fake world of the size in `args`, in which every collective returns at once."""
    rank = stage * args.data_parallel_size * args.model_parallel_size + tensor
    excepthook = sys.excepthook  # torch's would put this rank's number before every line of a traceback
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.global_num_gpus)
    local_rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed's pipeline module reads it
    try:
        yield form_groups(args, torch.device("meta"))
    finally:
        if local_rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = local_rank
        sys.excepthook = excepthook
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
