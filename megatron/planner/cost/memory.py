"""Bytes of every pipeline stage, by kind, at the moment of a training step that needs most.

Pure arithmetic, no torch: the search calls it for thousands of layouts. It describes what this trainer and the pinned
DeepSpeed really hold, read from their source and checked against measured runs (docs/planning.md):

- bf16 (`BF16_Optimizer`): bf16 weights and bf16 gradients, *unsharded* fp32 gradients, and 12 bytes a parameter of
  fp32 master weights and moments, sharded over data-parallel ranks. fp32 (ZeRO-1): fp32 weights and gradients.
- 1F1B keeps min(m, p - stage) micro-batches in flight (`TrainSchedule`), of each of them what the recomputation mode
  leaves stored. Between stages DeepSpeed passes each tensor-parallel rank's share of the hidden states; with sequence
  parallelism this is what the rank computes with.
- The last stage's buffers keep the logits of two micro-batches, long after their backward pass.
- The reduction copies all fp32 gradients that fit one bucket of 500 million elements.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from megatron import layout as tensors
from megatron.layout import LayerFile, LlamaShape
from megatron.planner.cost.activations import Activations, Ops
from megatron.planner.cost.compute import FP32
from megatron.planner.cost.machines import FRONTIER, Machine
from megatron.planner.cost.parallel_layout import ParallelLayout, Recompute, decoders_by_stage
from megatron.planner.cost.traffic import REDUCTION_BUCKET

ELEMENT = {"fp32": 4, "bfloat16": 2, "fp16": 2}

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
    """What one rank of a pipeline stage holds at its fullest moment, bytes; `layers` are layer-file numbers."""

    stage: int
    layers: range
    decoder_layers: int
    parameters: int  # of one tensor-parallel rank
    weights: int
    gradients: int
    optimizer: int  # fp32 masters and Adam's two moments: this data-parallel rank's shard
    activations: int  # stored for backward, of all micro-batches in flight
    workspace: int  # the layer being differentiated, gradients on their way, or reduction buffers
    logits: int
    pipeline: int  # what the engine keeps to receive and send
    tables: int  # rotary cos and sin
    communicators: int  # outside of torch's allocator
    moment: str  # which moment that is
    moments: dict[str, int]  # bytes of tensors at each moment that can be the fullest

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
) -> list[StageMemory]:
    """One entry per pipeline stage.

    `precision` is `bfloat16`, `fp16` (alike) or `fp32`; `stage_layers` the layer-file numbers of every stage, default
    DeepSpeed's partition by decoder layers; `ops` says how the fused operations run; `machine` what a communicator
    takes (on a CPU none takes any). `reduce_bucket_size` and `contiguous_gradients` are ZeRO's keys, without effect in
    bf16.
    Attention is a flash kernel. Raises ValueError where the shape does not fit the tensor-parallel size.
    """
    shape.check_tensor_parallel(layout.tensor)
    stages = stage_layers or default_stages(shape.num_layers, layout.pipe)
    sizes = Activations.of(shape, layout, seq_length, ELEMENT[precision], ops, isolate_documents)
    optimizer = _Optimizer(precision, reduce_bucket_size, contiguous_gradients)
    return [
        _stage(shape, layout, seq_length, optimizer, sizes, machine, stage, layers)
        for stage, layers in enumerate(stages)
    ]


def fewest_recomputed(layout: ParallelLayout, most: int, fits: Callable[[ParallelLayout], bool]) -> int | None:
    """The least `recompute_layers` below `most`, the layers of the longest stage, with which a layout fits.

    None if it fits only with all of them recomputed, or not at all. `fits` asks for the memory of a layout, which
    grows with every layer that is stored.
    """

    def enough(layers: int) -> bool:
        return fits(replace(layout, recompute="full", recompute_layers=layers))

    found = bisect_left(range(1, most), True, key=enough) + 1
    return found if found < most and enough(found) else None


def default_stages(num_layers: int, pipe: int) -> list[range]:
    """Layer-file numbers of each stage under `pipe_partition_method: type:transformer`.

    Decoder layers are dealt evenly, the first stages take one more where they do not divide; the embedding goes with
    the first and the norm and head with the last.
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
    neighbours = (stage > 0) + (stage < layout.pipe - 1)
    return world + tensor + data + gradient_norm + broadcast + neighbours


def _communicator_bytes(count: int, machine: Machine) -> int:
    return machine.first_communicator_bytes + (count - 1) * machine.communicator_bytes if count else 0


@dataclass(frozen=True)
class _Parameters:
    """Elements on one tensor-parallel rank."""

    decayed: int
    undecayed: int
    largest: int
    embedding: int  # 0 where the stage has none
    head: int
    layer: int  # a decoder layer's
    mlp_first: int
    mlp_second: int

    @property
    def all(self) -> int:
        return self.decayed + self.undecayed

    def padded(self, data: int) -> int:
        """As DeepSpeed flattens the two parameter groups: each to a multiple of twice the data-parallel size."""
        return sum(-(-group // (2 * data)) * 2 * data for group in (self.decayed, self.undecayed))


@lru_cache(maxsize=4096)
def _parameters(shape: LlamaShape, tensor: int, layers: range) -> _Parameters:
    held = {file: _held(file, shape, layers) for file in LayerFile}
    rows = {file: tensors.file_rows(file, shape) for file in LayerFile}
    counts = dict(held)
    if shape.tied:  # the last stage has a copy of the embedding, or the matrix itself if it is the first as well
        rows[LayerFile.HEAD] = rows[LayerFile.EMBEDDING]
        counts[LayerFile.HEAD] -= held[LayerFile.EMBEDDING] and held[LayerFile.HEAD]
    elements = {row: prod(tensors.rank_shape(row, shape, tensor)) for file in LayerFile for row in rows[file]}
    of_file = {file: sum(elements[row] for row in rows[file]) for file in LayerFile}
    every = sum(counts[file] * of_file[file] for file in LayerFile)
    decayed = sum(counts[file] * elements[row] for file in LayerFile for row in rows[file] if row.decays)
    return _Parameters(
        decayed=decayed,
        undecayed=every - decayed,
        largest=max((elements[row] for file in LayerFile for row in rows[file] if held[file]), default=0),
        embedding=held[LayerFile.EMBEDDING] * of_file[LayerFile.EMBEDDING],
        head=held[LayerFile.HEAD] * of_file[LayerFile.HEAD],
        layer=of_file[LayerFile.DECODER],
        mlp_first=elements[_MLP_FIRST],
        mlp_second=elements[_MLP_SECOND],
    )


_MLP_FIRST = next(row for row in tensors.DECODER_LAYER if row.packing is tensors.Packing.UP_GATE)
_MLP_SECOND = next(row for row in tensors.DECODER_LAYER if row.neox == "mlp.linear2.weight")


def _held(file: LayerFile, shape: LlamaShape, layers: range) -> int:
    """How many layer files of a kind are among `layers`."""
    indices = tensors.file_indices(file, shape.num_layers)
    return max(0, min(layers.stop, indices.stop) - max(layers.start, indices.start))


@dataclass(frozen=True)
class _Optimizer:
    """What DeepSpeed's optimizer of a precision does with gradients."""

    precision: str
    bucket: int  # elements
    contiguous: bool

    @property
    def element(self) -> int:
        return ELEMENT[self.precision]

    def gradients_always(self, padded: int) -> int:
        """Bytes of gradients that are there in every moment: fp32 ones of 16 bits, the contiguous bucket of fp32."""
        if self.precision != "fp32":
            return FP32 * padded
        return FP32 * self.bucket * self.contiguous

    def reduction(self, parameters: _Parameters, data: int) -> int:
        """Bytes that reducing the gradients takes: tensors reduced together are copied to one."""
        if self.precision != "fp32":  # two flat tensors, one for each parameter group
            together = parameters.decayed <= REDUCTION_BUCKET and parameters.undecayed and parameters.decayed
            return FP32 * parameters.padded(data) if together else 0
        shard = parameters.padded(data) // data
        if not self.contiguous:
            return FP32 * max(min(parameters.all, self.bucket), shard)
        # A second bucket, into which gradients move. Where it holds all of them the shard is cut out beside it, if the
        # communication has not let go of them by then: at most so much.
        return FP32 * (self.bucket + shard if self.bucket >= parameters.all else max(self.bucket, shard))


@dataclass(frozen=True)
class _Moment:
    """Bytes that come and go; `gradients` are those of the weights, in the weights' dtype."""

    name: str
    gradients: int
    activations: int
    workspace: int
    logits: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.workspace + self.logits


def _stage(
    shape: LlamaShape,
    layout: ParallelLayout,
    seq_length: int,
    optimizer: _Optimizer,
    sizes: Activations,
    machine: Machine,
    stage: int,
    layers: range,
) -> StageMemory:
    parameters = _parameters(shape, layout.tensor, layers)
    decoders = _held(LayerFile.DECODER, shape, layers)
    padded = parameters.padded(layout.data)
    moments = _Step(shape, layout, optimizer, sizes, stage, decoders, parameters).moments()
    fullest = max(moments, key=lambda moment: moment.total)
    accumulated = optimizer.gradients_always(padded)
    always = {
        "weights": optimizer.element * padded,
        "optimizer": 3 * FP32 * padded // layout.data,
        "pipeline": _message(layout, sizes) if layout.pipe > 1 else 0,
        "tables": FP32 * seq_length * shape.head_dim if decoders else 0,
    }
    peaks: dict[str, int] = {}
    for moment in moments:
        peaks[moment.name] = max(peaks.get(moment.name, 0), sum(always.values()) + accumulated + moment.total)
    return StageMemory(
        stage=stage,
        layers=layers,
        decoder_layers=decoders,
        parameters=parameters.all,
        **always,
        gradients=accumulated + fullest.gradients,
        activations=fullest.activations,
        workspace=fullest.workspace,
        logits=fullest.logits,
        communicators=0 if sizes.on_host else _communicator_bytes(communicators(layout, stage), machine),
        moment=fullest.name,
        moments=peaks,
    )


def _message(layout: ParallelLayout, sizes: Activations) -> int:
    """What a rank sends to the next stage: its part of the hidden states, or its slice of the sequence."""
    return sizes.gathered // layout.tensor + (sizes.tokens if sizes.documents else 0)


def _in_flight(layout: ParallelLayout, stage: int, done: int) -> float:
    """Micro-batches whose activations a stage stores at most once `done` of them have been differentiated.

    In whole stages: interleaved 1F1B (Narayanan et al. 2021) counts chunks of a v-th of a stage.
    """
    v, p, left = layout.virtual_stages, layout.pipe, layout.num_micro_batches - done
    if v == 1:
        return min(left, p - stage)
    return min(2 * (p - stage - 1) + (v - 1) * p + 1, v * left) / v


@dataclass(frozen=True)
class _Step:
    """The moments of a training step in which a rank of one stage can be fullest."""

    shape: LlamaShape
    layout: ParallelLayout
    optimizer: _Optimizer
    sizes: Activations
    stage: int
    decoders: int
    parameters: _Parameters

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.layout.pipe - 1

    @property
    def element(self) -> int:
        return self.optimizer.element

    def _mode(self, again: bool) -> Recompute:
        """What happens to a layer that is recomputed (`again`), and to one that is not although others are."""
        return "none" if self.layout.recompute == "full" and not again else self.layout.recompute

    def moments(self) -> list[_Moment]:
        """The first backward pass finds most micro-batches in flight, the second finds gradients to add to."""
        moments = self._backward(done=0)
        if self.layout.num_micro_batches > 1:
            moments += self._backward(done=1)
        last_two = min(2, self.layout.num_micro_batches)
        moments.append(
            _Moment(
                "reduction",
                self.element * self.parameters.all,
                last_two * self._kept_beside_logits,
                self.optimizer.reduction(self.parameters, self.layout.data),
                last_two * self.sizes.logits * self.last,
            )
        )
        return moments

    @property
    def _kept_beside_logits(self) -> int:
        """The logits' graph, which the engine keeps with them, ends in the tensor received and its gradient."""
        return 2 * self.sizes.hidden if self.last and not self.first else 0

    def _backward(self, done: int) -> list[_Moment]:
        """A backward pass when `done` micro-batches have been through theirs, from the loss to the first layer."""
        sizes, parameters = self.sizes, self.parameters
        alone = self.layout.tensor == 1 or sizes.sliced  # messages are what the ranks compute with
        hidden, again = sizes.hidden, self.layout.recomputed(self.decoders)
        layer_modes = [self._mode(number < again) for number in range(self.decoders)]
        layers = [sizes.stored_by_layer(mode) for mode in layer_modes]

        # The engine keeps a received tensor beside the clone that it computes with; with tensor parallelism the tensor
        # is put together from the ranks' shares, and computed with. Its output it keeps until the backward pass.
        received = hidden if alone and not self.first else 0
        output = 0 if self.last else _message(self.layout, sizes)
        ids = (2 if alone else 3) * sizes.tokens if self.first else 0
        positions = 2 * sizes.tokens if sizes.documents else 0
        of_one = sum(layers) + received + output + ids + positions
        stored = int(_in_flight(self.layout, self.stage, done) * of_one)
        others = stored - of_one
        logits, before = 0, 0
        if self.last:
            logits = (1 + done) * sizes.logits
            before = done * self._kept_beside_logits

        # The gradient of the output is in the engine's buffer, or is put together from shares as the output is again.
        restored = 0 if alone or self.last else hidden
        incoming = hidden * (2 if sizes.several else 1) if self.last else restored

        # Gradients of weights: all from the second backward pass on, in the first they grow from the head down.
        everything = self.element * parameters.all
        matrices = self.element * parameters.layer
        head = self.element * (parameters.all - parameters.embedding) - self.decoders * matrices

        moments = []
        if self.last:
            after = 2 * hidden + sizes.inverse_rms  # the norm's input and output
            gradient = max(sizes.loss_temporaries, sizes.column_backward + parameters.head * self.element)
            moments.append(_Moment("loss", done * everything, stored + before + after, gradient, logits + sizes.logits))
        # The last layer of each kind has most stored besides, the first has most gradients already.
        for number in sorted({self.decoders - 1, again - 1, 0} - {-1}) if self.decoders else []:
            work = restored + sizes.layer_backward(
                layer_modes[number],
                self.element * parameters.mlp_first,
                self.element * parameters.mlp_second,
                incoming,
            )
            freed = sum(layers[number + 1 :])
            grown = head + (self.decoders - 1 - number) * matrices
            moments.append(_Moment("backward", everything if done else grown, stored + before - freed, work, logits))
        finished = before + output + ids + restored + (0 if self.last else incoming)
        if self.first:
            # gathered, put in order, and without the rows of other ranks
            whole = sizes.gathered * (3 if sizes.several else 2) if sizes.sliced else 0
            work = whole + hidden * (2 if sizes.several else 1) + self.element * parameters.embedding
            grown = everything - (0 if done else self.element * parameters.embedding)
            moments.append(_Moment("embedding", grown, others + finished, work, logits))
        if self.optimizer.precision != "fp32":
            inputs = 0 if self.first else 2 * hidden  # the input and its gradient
            work = FP32 * parameters.largest
            moments.append(_Moment("accumulation", everything, others + finished + inputs, work, logits))
        return moments
