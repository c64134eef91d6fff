"""Bytes of every pipeline stage, by kind, at the peak of a training step.

Pure arithmetic, no torch: the search calls it for thousands of layouts. It models what this trainer and the pinned
DeepSpeed and megatron-core actually allocate, taken from their source and checked against measured runs
(docs/planning.md).

DeepSpeed (`moments`):

- bf16 (`BF16_Optimizer`): bf16 weights and bf16 gradients, *unsharded* fp32 gradients, and 12 bytes a parameter of
  fp32 master weights and moments, sharded over data-parallel ranks. fp32 (ZeRO-1): fp32 weights and gradients.
- 1F1B keeps min(m, p - stage) micro-batches in flight (`TrainSchedule`), each with the activations that the
  recomputation mode stores. Between stages DeepSpeed passes each tensor-parallel rank's share of the hidden states;
  with sequence parallelism this is the slice that the rank computes with.
- The last stage holds the logits of one micro-batch: our hook frees them, DeepSpeed would keep two more.
- The reduction copies all fp32 gradients that fit one bucket of 500 million elements.

megatron-core (`megatron_moments`):

- Weights, unsharded fp32 gradients and nothing else of that size: a weight's gradient is accumulated as it arrives, and
  freed. Masters and moments as above; fp32 weights are their own masters.
- With virtual stages a rank has passes of chunks in flight, each 1/v the size of a whole stage's.
- Outputs are freed once they are sent, logits after their backward pass; the reduction makes no copy.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron import layout as tensors
from megatron.layout import LayerFile, LlamaShape
from megatron.planner.cost.activations import Activations, Ops
from megatron.planner.cost.compute import FP32
from megatron.planner.cost.machines import FRONTIER, Machine
from megatron.planner.cost.megatron_moments import MegatronMoments
from megatron.planner.cost.moments import (
    ELEMENT,
    DeepSpeedMoments,
    GradientHandling,
    held_files,
    stage_parameters,
)
from megatron.planner.cost.parallel_layout import ParallelLayout, decoders_by_stage
from megatron.planner.cost.traffic import REDUCTION_BUCKET

KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "workspace",
    "logits",
    "pipeline",
    "tables",
    "communicators",
)


@dataclass(frozen=True)
class StageMemory:
    """Bytes held by one rank of a pipeline stage at its peak.

    `chunks` are layer-file numbers, of the stage, or of each of its virtual stages.
    """

    stage: int
    chunks: tuple[range, ...]
    decoder_layers: int
    parameters: int  # of one tensor-parallel rank
    weights: int
    gradients: int
    optimizer: int  # fp32 masters and Adam's two moments: this data-parallel rank's shard
    activations: int  # stored for backward, of all micro-batches in flight
    workspace: int  # the layer being differentiated, gradients being accumulated, or reduction buffers
    logits: int
    pipeline: int  # the engine's receive and send buffers
    tables: int  # rotary cos and sin
    communicators: int  # outside torch's allocator
    moment: str  # the moment of the peak
    moments: dict[str, int]  # bytes of tensors at each moment that can be the peak

    @property
    def layers(self) -> list[int]:
        return [number for chunk in self.chunks for number in chunk]

    @property
    def by_kind(self) -> dict[str, int]:
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def allocated(self) -> int:
        """Peak of tensors: what `torch.cuda.max_memory_allocated` shows."""
        return self.peak - self.communicators

    @property
    def peak(self) -> int:
        return sum(self.by_kind.values())


def plan_memory(
    shape: LlamaShape,
    layout: ParallelLayout,
    seq_length: int,
    precision: str = "bfloat16",
    *,
    stage_layers: Sequence[range] | None = None,
    isolate_documents: bool = False,
    ops: Ops = "kernels",
    machine: Machine = FRONTIER,
    reduce_bucket_size: int = REDUCTION_BUCKET,
    contiguous_gradients: bool = False,
    only: Sequence[int] | None = None,
) -> list[StageMemory]:
    """Memory of every pipeline stage, or of the stages in `only`.

    `precision` is `bfloat16`, `fp16` (the same) or `fp32`; `stage_layers` are the layer-file numbers of every stage, or
    of every virtual stage in the model's order, by default distributed evenly; `ops` says how the fused operations run;
    `machine` how much a communicator takes (nothing on CPUs). `reduce_bucket_size` and `contiguous_gradients` are
    ZeRO's keys, without effect in bf16. Attention is taken to be a flash kernel. Raises ValueError if the shape cannot
    be split over the tensor-parallel size.
    """
    shape.check_tensor_parallel(layout.tensor)
    chunks = stage_layers or default_stages(shape.num_layers, layout.pipe * layout.virtual_stages)
    sizes = Activations.of(shape, layout, seq_length, ELEMENT[precision], ops, isolate_documents)
    optimizer = GradientHandling(precision, reduce_bucket_size, contiguous_gradients)
    return [
        _stage(shape, layout, seq_length, optimizer, sizes, machine, stage, tuple(chunks[stage :: layout.pipe]))
        for stage in (range(layout.pipe) if only is None else only)
    ]


def candidates_for_fullest(pipe: int) -> list[int]:
    """The stages that can need the most memory if layers are distributed evenly: both ends, and the second, which has
    the most in flight of the middle stages and no fewer layers."""
    return sorted({0, min(1, pipe - 1), pipe - 1})


def fewest_recomputed(layout: ParallelLayout, most: int, fits: Callable[[ParallelLayout], bool]) -> int | None:
    """The smallest `recompute_layers` below `most`, the number of layers of the longest stage, with which a layout
    fits.

    None if it fits only with all of them recomputed, or not at all. `fits` tests the memory of a layout, which grows
    with every layer that is stored.
    """

    def enough(layers: int) -> bool:
        return fits(replace(layout, recompute="full", recompute_layers=layers))

    found = bisect_left(range(1, most), True, key=enough) + 1
    return found if found < most and enough(found) else None


def default_stages(num_layers: int, pipe: int) -> list[range]:
    """Layer-file numbers of each stage under `pipe_partition_method: type:transformer`, or of each virtual stage.

    Decoder layers are distributed evenly, the first stages taking one more if they do not divide; the embedding is on
    the first stage, norm and head are on the last.
    """
    edges = itertools.accumulate(decoders_by_stage(num_layers, pipe), initial=0)
    starts = [tensors.decoder_index(edge) for edge in edges]
    starts[0], starts[-1] = tensors.EMBEDDING_INDEX, tensors.head_index(num_layers) + 1
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def communicators(layout: ParallelLayout, stage: int) -> int:
    """Process groups of more than one rank that a rank of `stage` uses, each an RCCL communicator."""
    world = layout.world_size > 1
    tensor = layout.tensor > 1
    data = layout.data > 1
    gradient_norm = layout.tensor * layout.pipe > 1
    broadcast = layout.pipe > 1
    neighbors = (stage > 0) + (stage < layout.pipe - 1)
    if layout.engine == "megatron" and layout.pipe > 1:  # to each neighbor a link for activations and one for gradients
        neighbors = 4 if layout.virtual_stages > 1 else 2 * neighbors
    return world + tensor + data + gradient_norm + broadcast + neighbors


def _communicator_bytes(count: int, machine: Machine) -> int:
    return machine.first_communicator_bytes + (count - 1) * machine.communicator_bytes if count else 0


def _stage(
    shape: LlamaShape,
    layout: ParallelLayout,
    seq_length: int,
    optimizer: GradientHandling,
    sizes: Activations,
    machine: Machine,
    stage: int,
    chunks: tuple[range, ...],
) -> StageMemory:
    # The peak is what is always allocated, plus the fullest moment's temporaries.
    parameters = stage_parameters(shape, layout.tensor, chunks)
    decoders = held_files(LayerFile.DECODER, shape, chunks)
    padded = parameters.padded(layout.data)
    kind = MegatronMoments if layout.engine == "megatron" else DeepSpeedMoments
    step = kind(shape, layout, optimizer, sizes, stage, decoders, parameters)
    moments = step.moments()
    fullest = max(moments, key=lambda moment: moment.total)
    accumulated = step.gradients_always(padded)
    always = {
        "weights": optimizer.element * (padded + parameters.frozen),
        "optimizer": step.optimizer_bytes(padded),
        "pipeline": step.buffers,
        "tables": FP32 * seq_length * shape.head_dim if decoders else 0,
    }
    peaks: dict[str, int] = {}
    for moment in moments:
        peaks[moment.name] = max(peaks.get(moment.name, 0), sum(always.values()) + accumulated + moment.total)
    return StageMemory(
        stage=stage,
        chunks=chunks,
        decoder_layers=decoders,
        parameters=parameters.all + parameters.frozen,
        **always,
        gradients=accumulated + fullest.gradients,
        activations=fullest.activations,
        workspace=fullest.workspace,
        logits=fullest.logits,
        communicators=0 if sizes.on_host else _communicator_bytes(communicators(layout, stage), machine),
        moment=fullest.name,
        moments=peaks,
    )
