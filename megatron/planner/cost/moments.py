"""The moments of a training step at which a rank of one stage may reach its peak memory, under DeepSpeed's engine.

megatron-core's: `megatron.planner.cost.megatron_moments`. A moment lists what is allocated in addition to weights,
optimizer states and what the engine always keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron import layout as tensors
from megatron.layout import LayerFile, LlamaShape
from megatron.planner.cost.activations import Activations
from megatron.planner.cost.compute import FP32
from megatron.planner.cost.parallel_layout import ParallelLayout, Recompute
from megatron.planner.cost.traffic import REDUCTION_BUCKET

ELEMENT = {"fp32": 4, "bfloat16": 2, "fp16": 2}


@dataclass(frozen=True)
class StageParameters:
    """Trained elements on one tensor-parallel rank; with an adapter the others are `frozen`."""

    decayed: int
    undecayed: int
    largest: int
    embedding: int  # 0 where the stage has none
    head: int
    layer: int  # a decoder layer's
    mlp_first: int
    mlp_second: int
    frozen: int

    @property
    def all(self) -> int:
        return self.decayed + self.undecayed

    def padded(self, data: int) -> int:
        """Elements once DeepSpeed has padded each of its two parameter groups to a multiple of twice the data-parallel
        size."""
        return sum(-(-group // (2 * data)) * 2 * data for group in (self.decayed, self.undecayed))


@lru_cache(maxsize=4096)
def stage_parameters(shape: LlamaShape, tensor: int, chunks: tuple[range, ...]) -> StageParameters:
    held = {file: held_files(file, shape, chunks) for file in LayerFile}
    rows = {file: tensors.file_rows(file, shape) for file in LayerFile}
    counts = dict(held)
    if shape.tied:  # the last stage has a copy of the embedding, or the matrix itself if it is the first as well
        rows[LayerFile.HEAD] = rows[LayerFile.EMBEDDING]
        counts[LayerFile.HEAD] -= held[LayerFile.EMBEDDING] and held[LayerFile.HEAD]
    whole = {row: prod(tensors.rank_shape(row, shape, tensor)) for file in LayerFile for row in rows[file]}
    trained = set(tensors.trained_rows(shape))
    elements = {row: count * (row in trained) for row, count in whole.items()}
    of_file = {file: sum(elements[row] for row in rows[file]) for file in LayerFile}
    every = sum(counts[file] * of_file[file] for file in LayerFile)
    decayed = sum(counts[file] * elements[row] for file in LayerFile for row in rows[file] if row.decays)
    return StageParameters(
        decayed=decayed,
        undecayed=every - decayed,
        largest=max((elements[row] for file in LayerFile for row in rows[file] if held[file]), default=0),
        embedding=held[LayerFile.EMBEDDING] * of_file[LayerFile.EMBEDDING],
        head=held[LayerFile.HEAD] * of_file[LayerFile.HEAD],
        layer=of_file[LayerFile.DECODER],
        mlp_first=elements[_MLP_FIRST],
        mlp_second=elements[_MLP_SECOND],
        frozen=sum(counts[file] * whole[row] for file in LayerFile for row in rows[file]) - every,
    )


_MLP_FIRST = next(row for row in tensors.DECODER_LAYER if row.packing is tensors.Packing.UP_GATE)
_MLP_SECOND = next(row for row in tensors.DECODER_LAYER if row.neox == "mlp.linear2.weight")


def held_files(file: LayerFile, shape: LlamaShape, chunks: Sequence[range]) -> int:
    """How many layer files of a kind are among `chunks`."""
    indices = tensors.file_indices(file, shape.num_layers)
    return sum(max(0, min(chunk.stop, indices.stop) - max(chunk.start, indices.start)) for chunk in chunks)


@dataclass(frozen=True)
class GradientHandling:
    """How DeepSpeed's optimizer for a precision stores and reduces gradients."""

    precision: str
    bucket: int  # elements
    contiguous: bool

    @property
    def element(self) -> int:
        return ELEMENT[self.precision]

    def gradients_always(self, padded: int) -> int:
        """Bytes of gradients that are allocated at every moment: fp32 accumulators for 16-bit training, the contiguous
        bucket for fp32."""
        if self.precision != "fp32":
            return FP32 * padded
        return FP32 * self.bucket * self.contiguous

    def reduction(self, parameters: StageParameters, data: int) -> int:
        """Bytes that reducing the gradients takes: tensors reduced together are first copied into one."""
        if self.precision != "fp32":  # two flat tensors, one for each parameter group
            together = parameters.decayed <= REDUCTION_BUCKET and parameters.undecayed and parameters.decayed
            return FP32 * parameters.padded(data) if together else 0
        shard = parameters.padded(data) // data
        if not self.contiguous:
            return FP32 * max(min(parameters.all, self.bucket), shard)
        # Gradients are copied into a second bucket. If it holds all of them, the shard is cut out next to it, unless
        # the communication has freed it by then: an upper bound.
        return FP32 * (self.bucket + shard if self.bucket >= parameters.all else max(self.bucket, shard))


@dataclass(frozen=True)
class Moment:
    """Bytes of temporaries; `gradients` are those of the weights, in the weights' dtype."""

    name: str
    gradients: int
    activations: int
    workspace: int
    logits: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.workspace + self.logits


def message_size(layout: ParallelLayout, sizes: Activations) -> int:
    """Bytes that a rank sends to the next stage: its share of the hidden states, or its slice of the sequence."""
    return sizes.gathered // layout.tensor + (sizes.tokens if sizes.documents else 0)


def in_flight(layout: ParallelLayout, stage: int, done: int) -> int:
    """The most micro-batches whose activations a stage stores after the backward passes of `done` micro-batches."""
    return min(layout.num_micro_batches - done, layout.pipe - stage)


@dataclass(frozen=True)
class DeepSpeedMoments:
    """The moments of a training step at which a rank of one stage may reach its peak memory."""

    shape: LlamaShape
    layout: ParallelLayout
    optimizer: GradientHandling
    sizes: Activations
    stage: int
    decoders: int
    parameters: StageParameters

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.layout.pipe - 1

    @property
    def element(self) -> int:
        return self.optimizer.element

    @property
    def buffers(self) -> int:
        """Bytes of the engine's receive and send buffers."""
        return message_size(self.layout, self.sizes) if self.layout.pipe > 1 else 0

    def gradients_always(self, padded: int) -> int:
        return self.optimizer.gradients_always(padded)

    def optimizer_bytes(self, padded: int) -> int:
        return 3 * FP32 * padded // self.layout.data

    def _mode(self, again: bool) -> Recompute:
        """Recomputation mode of a layer; `again` says whether full recomputation includes it."""
        return "none" if self.layout.recompute == "full" and not again else self.layout.recompute

    def moments(self) -> list[Moment]:
        """The first backward pass has the most micro-batches in flight, the second has gradients to add to."""
        moments = self._backward(done=0)
        if self.layout.num_micro_batches > 1:
            moments += self._backward(done=1)
        reduction = self.optimizer.reduction(self.parameters, self.layout.data)
        moments.append(Moment("reduction", self.element * self.parameters.all, 0, reduction, 0))
        return moments

    def _backward(self, done: int) -> list[Moment]:
        """One backward pass, from the loss to the first layer, after those of `done` micro-batches."""
        sizes, parameters = self.sizes, self.parameters
        alone = self.layout.tensor == 1 or sizes.sliced  # messages are what the ranks compute with
        hidden, again = sizes.hidden, self.layout.recomputed(self.decoders)
        layer_modes = [self._mode(number < again) for number in range(self.decoders)]
        layers = [sizes.stored_by_layer(mode) for mode in layer_modes]

        # The engine keeps a received tensor next to the clone it computes with; with tensor parallelism it computes
        # with the tensor gathered from the ranks' shares. It keeps its output until the backward pass.
        received = hidden if alone and not self.first else 0
        output = 0 if self.last else message_size(self.layout, sizes)
        ids = (2 if alone else 3) * sizes.tokens if self.first else 0
        positions = 2 * sizes.tokens if sizes.documents else 0
        ends = sizes.ends
        kept_by_embedding = ends.embedding if ends is not None and self.first else 0
        of_one = sum(layers) + received + output + ids + positions + kept_by_embedding
        stored = in_flight(self.layout, self.stage, done) * of_one
        others = stored - of_one
        logits = 0
        if self.last:
            logits = sizes.logits if ends is None else ends.prediction + (1 + done) * ends.targets

        # The output's gradient is in the engine's buffer; or it is gathered from shares, and the output is again.
        restored = 0 if alone or self.last else hidden
        incoming = hidden if self.last else restored

        # Weight gradients: all exist from the second backward pass on; in the first they appear from the head down.
        everything = self.element * parameters.all
        matrices = self.element * parameters.layer
        head = self.element * (parameters.all - parameters.embedding) - self.decoders * matrices

        moments = []
        if self.last:
            after = 2 * hidden + sizes.inverse_rms  # the norm's input and output
            gradient = max(sizes.loss_temporaries, sizes.column_backward + parameters.head * self.element)
            if ends is not None:
                after += ends.head
                gradient = max(ends.loss, gradient)
            # The gradient of the logits overwrites them.
            moments.append(Moment("loss", done * everything, stored + after, gradient, logits))
        # The last layer of each mode has the most activations stored, the first layer the most gradients.
        for number in sorted({self.decoders - 1, again - 1, 0} - {-1}) if self.decoders else []:
            work = restored + sizes.layer_backward(
                layer_modes[number],
                self.element * parameters.mlp_first,
                self.element * parameters.mlp_second,
                incoming,
            )
            freed = sum(layers[number + 1 :])
            grown = head + (self.decoders - 1 - number) * matrices
            moments.append(Moment("backward", everything if done else grown, stored - freed, work, logits))
        finished = output + ids + restored + (0 if self.last else incoming)
        if self.first:
            # gathered, reordered, and with the rows of other ranks masked
            whole = sizes.gathered * (3 if sizes.several else 2) if sizes.sliced else 0
            work = whole + hidden * (2 if sizes.several else 1) + self.element * parameters.embedding
            work += 0 if ends is None else ends.embedding + ends.embedding_backward
            grown = everything - (0 if done else self.element * parameters.embedding)
            moments.append(Moment("embedding", grown, others + finished, work, logits))
        if self.optimizer.precision != "fp32":
            inputs = 0 if self.first else 2 * hidden  # the input and its gradient
            work = FP32 * parameters.largest
            moments.append(Moment("accumulation", everything, others + finished + inputs, work, logits))
        return moments
