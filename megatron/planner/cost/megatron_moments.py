"""The moments of a training step at which a rank of one stage may reach its peak memory, under megatron-core's
engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from megatron.planner.cost.compute import FP32
from megatron.planner.cost.interleaved import pass_order
from megatron.planner.cost.moments import DeepSpeedMoments, Moment
from megatron.planner.cost.parallel_layout import Recompute


class MegatronMoments(DeepSpeedMoments):
    """Under megatron-core every parameter has an fp32 gradient, into which gradients are accumulated as they arrive;
    outputs are freed once they are sent, logits after the backward pass of the loss."""

    @property
    def buffers(self) -> int:
        """Bytes of receive buffers: with virtual stages the next input and the next gradient are received early."""
        return 2 * self.message * (self.layout.virtual_stages > 1)

    @property
    def message(self) -> int:
        return self.sizes.hidden if self.layout.pipe > 1 else 0

    def gradients_always(self, padded: int) -> int:
        return FP32 * padded

    def optimizer_bytes(self, padded: int) -> int:
        """Masters and moments; fp32 weights are their own masters."""
        return (2 if self.optimizer.precision == "fp32" else 3) * FP32 * padded // self.layout.data

    def moments(self) -> list[Moment]:
        """Any backward pass after the warm-up, and the optimizer step."""
        return [*self._backward(done=0), Moment("optimizer", 0, 0, FP32 * self.parameters.largest, 0)]

    def _backward(self, done: int) -> list[Moment]:
        sizes, layout = self.sizes, self.layout
        again = layout.recomputed(self.decoders)
        modes = [self._mode(number < again) for number in range(self.decoders)]
        chunks = self._chunks()
        positions = 2 * sizes.tokens if sizes.documents else 0
        ids = [sizes.tokens if self.first and number == 0 else 0 for number in range(len(chunks))]
        ends, raw = sizes.ends, 0
        if ends is not None:  # both end stages hold all micro-batches of a step on the device
            raw = layout.num_micro_batches * 2 * ends.targets * (self.first or self.last)
            ids = [ends.embedding if one else 0 for one in ids]
        of_chunk = [
            sum(sizes.stored_by_layer(modes[layer]) for layer in chunk) + ids[number] + positions
            for number, chunk in enumerate(chunks)
        ]
        # The most that is stored when a chunk's backward pass begins.
        stored = [0] * len(chunks)
        few = min(layout.num_micro_batches, 3 * layout.pipe)  # everything after that repeats
        for number, counts in in_flight_by_chunk(layout.pipe, layout.virtual_stages, few, self.stage):
            held = sum(count * one for count, one in zip(counts, of_chunk, strict=True))
            stored[number] = max(stored[number], held + raw)
        moments = self._loss(stored[-1]) if self.last else []
        if sizes.joined and "none" in modes:
            # The last backward pass's received gradient, its input and its input's gradient are still allocated.
            moments.append(Moment("forward", 0, max(stored) + 3 * self.message, sizes.layer_forward, 0))
        for number, chunk in enumerate(chunks):
            moments += self._layers(chunk, modes, stored[number])
        if self.first:
            whole = sizes.gathered * (3 if sizes.several else 2) if sizes.sliced else 0
            work = whole + sizes.hidden * (2 if sizes.several else 1) + self.element * self.parameters.embedding
            work += 0 if ends is None else ends.embedding_backward
            moments.append(Moment("embedding", 0, stored[0] - of_chunk[0] + ids[0], work, 0))
        return moments

    def _chunks(self) -> list[range]:
        """This rank's decoder layers by chunk, counted from 0."""
        virtual = self.layout.virtual_stages
        sizes = [self.decoders // virtual + (number < self.decoders % virtual) for number in range(virtual)]
        edges = list(accumulate(sizes, initial=0))
        return [range(start, stop) for start, stop in pairwise(edges)]

    def _loss(self, stored: int) -> list[Moment]:
        """The loss, whose gradient overwrites the logits and then exists next to the gradients of the head and of its
        input."""
        sizes = self.sizes
        kept = stored + 2 * sizes.hidden + sizes.inverse_rms  # the norm's input and output
        of_head = sizes.column_backward + self.parameters.head * self.element
        if sizes.ends is not None:
            kept += sizes.ends.head + sizes.ends.prediction
            return [Moment("loss", 0, kept, max(sizes.ends.loss, of_head), 0)]
        return [Moment("loss", 0, kept, max(sizes.loss_temporaries, of_head), sizes.logits)]

    def _layers(self, chunk: range, modes: Sequence[Recompute], stored: int) -> list[Moment]:
        """The last layer of each recomputation mode in a chunk; the layers after it have freed what they stored."""
        sizes, parameters = self.sizes, self.parameters
        moments = []
        for mode in dict.fromkeys(modes[layer] for layer in chunk):
            layer = max(layer for layer in chunk if modes[layer] == mode)
            work = sizes.layer_backward(
                mode, self.element * parameters.mlp_first, self.element * parameters.mlp_second, incoming=sizes.hidden
            )
            freed = sum(sizes.stored_by_layer(modes[behind]) for behind in range(layer + 1, chunk.stop))
            moments.append(Moment("backward", 0, stored - freed, work, 0))
        return moments


@lru_cache(maxsize=4096)
def in_flight_by_chunk(
    pipe: int, virtual: int, num_micro_batches: int, stage: int
) -> frozenset[tuple[int, tuple[int, ...]]]:
    """For every backward pass of a stage's rank: its chunk, and the passes in flight by chunk, including itself."""
    counts, found = [0] * virtual, set()
    for work in pass_order(pipe, virtual, num_micro_batches, stage):
        if work.kind == "forward":
            counts[work.chunk] += 1
        else:
            found.add((work.chunk, tuple(counts)))
            counts[work.chunk] -= 1
    return frozenset(found)
