"""The moments of a training step in which a rank of one stage can be fullest, under megatron-core's engine."""

from __future__ import annotations

from megatron.planner.cost.compute import FP32
from megatron.planner.cost.moments import DeepSpeedMoments, Moment, in_flight


class MegatronMoments(DeepSpeedMoments):
    """The same under megatron-core: an fp32 gradient for every parameter, to which each is added as it comes; outputs
    are let go once they are sent, logits once the loss has been differentiated."""

    @property
    def buffers(self) -> int:
        """With virtual stages the next input and the next gradient are received ahead."""
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
        """Any backward pass behind the warm-up, and the optimizer's."""
        return [*self._backward(done=0), Moment("optimizer", 0, 0, FP32 * self.parameters.largest, 0)]

    def _backward(self, done: int) -> list[Moment]:
        sizes, parameters, layout = self.sizes, self.parameters, self.layout
        again = layout.recomputed(self.decoders)
        modes = [self._mode(number < again) for number in range(self.decoders)]
        layers = [sizes.stored_by_layer(mode) for mode in modes]
        positions = 2 * sizes.tokens if sizes.documents else 0
        ids = sizes.tokens if self.first else 0
        of_one = sum(layers) + ids + positions
        stored = int(in_flight(layout, self.stage, done) * of_one)
        # Of one chunk, the last of the rank's in the model: what the layers behind the one being differentiated held.
        chunk = max(1, self.decoders // layout.virtual_stages)

        moments = []
        if self.last:
            after = 2 * sizes.hidden + sizes.inverse_rms  # the norm's input and output
            # first the logits beside their gradient, then that beside the gradients of the head and its input
            of_head = sizes.column_backward + parameters.head * self.element
            moments.append(Moment("loss", 0, stored + after, sizes.loss_temporaries, 2 * sizes.logits))
            moments.append(Moment("loss", 0, stored + after, of_head, sizes.logits))
        incoming = sizes.hidden * (2 if sizes.several and self.last else 1)
        for number in sorted({self.decoders - 1, again - 1, self.decoders - chunk, 0} - {-1}) if self.decoders else []:
            work = sizes.layer_backward(
                modes[number], self.element * parameters.mlp_first, self.element * parameters.mlp_second, incoming
            )
            behind = self.decoders - 1 - number if layout.virtual_stages == 1 else 0
            moments.append(Moment("backward", 0, stored - sum(layers[number + 1 :]) * bool(behind), work, 0))
        if self.first:
            whole = sizes.gathered * (3 if sizes.several else 2) if sizes.sliced else 0
            work = whole + sizes.hidden * (2 if sizes.several else 1) + self.element * parameters.embedding
            left = stored - (of_one if layout.virtual_stages == 1 else of_one // layout.virtual_stages)
            moments.append(Moment("embedding", 0, left, work, 0))
        return moments
