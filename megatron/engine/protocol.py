"""The engine interface, which is all that trainer, evaluation, generation, checkpoint and supervision use.

An engine owns this rank's pipeline stage, moves micro-batches through the pipeline, reduces gradients and applies the
optimizer. It is built by `megatron.engine.build` with uninitialized weights: fill them from a checkpoint or with
`initialize_weights`, and call `weights_changed` after writing to a parameter.

All methods except the properties, `numbered_layers`, `tied_copies` and those for checkpoints are collective: every rank
calls them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron.engine.batches import ScoreBatch, StepBatch
    from megatron.engine.optimizer_shards import OptimizerShard, ReadShard
    from megatron.model.cache import CachedTokens
    from megatron.model.features import PooledTokens
    from megatron.parallel.place import Place
    from megatron.parallel.process_groups import ModelGroups

Around = Callable[[str], AbstractContextManager[Any]]
"""`with around(phase):` surrounds each part of a step: data, forward, backward, pipeline, reduce, optimizer, result."""


def no_phases(phase: str) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step; the same on all ranks except for `replica_loss`.

    `loss` is the mean over the learned tokens of the global batch, in nats; `replica_loss` is the mean over this
    data-parallel replica's micro-batches, known only on the last stage. `applied` is False if the weights are
    unchanged because the gradient norm is not finite; `overflow` is True if the loss scale was the cause, and was
    lowered. `loss_scale` is the scale used in the step, None without one.
    """

    loss: float
    grad_norm: float
    applied: bool
    replica_loss: float | None = None
    overflow: bool = False
    loss_scale: float | None = None


@dataclass(frozen=True)
class LossScaleState:
    """The fp16 loss scale and the state that determines its changes: steps so far, the step of the last overflow,
    overflows left before it is lowered."""

    scale: float
    steps: int = 0
    last_overflow: int = -1
    hysteresis: int = 1


@dataclass(frozen=True)
class Counters:
    """Counters of an engine over a whole run: optimizer steps attempted, samples read, steps not applied (`skipped`).

    `overflows` counts the skipped steps in which fp16 gradients overflowed; `loss_scale` is fp16's loss scale.
    """

    steps: int = 0
    samples: int = 0
    skipped: int = 0
    overflows: int = 0
    loss_scale: LossScaleState | None = None

    @property
    def not_finite(self) -> int:
        """Number of steps skipped for a non-finite loss or gradient that is not an overflow."""
        return self.skipped - self.overflows


class PipelineStage(Protocol):
    """This rank's part of the model."""

    def numbered_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """(layer file number, module) of every layer with parameters that this stage owns, their weights up to date.

        Between steps an engine may still be gathering weights until this or `tied_copies` is called: code that keeps a
        module must call one of them before reading from it again.
        """
        ...

    def tied_copies(self) -> Iterator[tuple[int, nn.Module]]:
        """(number of the file that holds it, module) of a tied embedding that another stage owns."""
        ...

    def stage_layers(self, stage: int, virtual: int = 0) -> range:
        """Layer file numbers of one run of layers of a stage, including layers without parameters; the run is that of
        virtual stage `virtual`."""
        ...


class Engine(PipelineStage, Protocol):
    """One rank's engine. `place` and `groups` are the rank's coordinates and process groups; `counters` can be set to
    continue a run."""

    place: Place
    groups: ModelGroups
    counters: Counters

    def describe(self) -> list[str]:
        """Lines for the start of the log that describe the engine's settings."""
        ...

    def initialize_weights(self) -> None:
        """Initialize all weights, the same model for every layout."""
        ...

    def weights_changed(self) -> None:
        """Update everything derived from the parameters: fp32 masters, other stages' copies of a tied embedding."""
        ...

    def set_learning_rate(self, rate: float) -> None: ...

    def train_step(self, batch: StepBatch) -> StepResult:
        """Forward, backward, gradient reduction and optimizer step for one global batch."""
        ...

    def evaluate(self, batch: StepBatch) -> float:
        """Mean loss of a batch, without changing the training state."""
        ...

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor | None:
        """This rank's logits [b, s, V / tp] of ids [b, s] on the last stage, None on the others."""
        ...

    def forward_cached(self, inputs: Tensor, tokens: CachedTokens) -> Tensor:
        """Run this stage's layers on cached tokens: `inputs` are ids [b, s] or the previous stage's hidden states.

        Returns hidden states for the next stage; on the last stage, this rank's logits [n, 1, V / tp] of the n outputs
        of `tokens`. Collective only over the tensor-parallel group: the caller moves hidden states between stages
        (`megatron.generation.stages`).
        """
        ...

    def forward_pooled(self, inputs: Tensor, work: PooledTokens) -> tuple[Tensor, dict[int, Tensor]]:
        """`megatron.model.features.run_pooled` on this stage's layers: the next stage's input, and pooled vectors.

        `inputs` are the model's input or the previous stage's hidden states. Not available with sequence parallelism.
        Collective only over the tensor-parallel group, like `forward_cached`.
        """
        ...

    def token_scores(self, batches: Iterable[ScoreBatch] | None, num_micro_batches: int) -> list[Tensor] | None:
        """Scores (`megatron.model.scores`) of each micro-batch's queries on the last stage; None on the others.

        `batches` are this data-parallel rank's, None on stages that read no data. Within one call they must all have
        the same shape [b, s], on all ranks; the next call may use another.
        """
        ...

    # --- checkpoint contents other than weights

    def meta_content(self) -> dict[str, Any]:
        """Plain values of `mp_rank_KK_model_states.pt`, which data-parallel rank 0 writes."""
        ...

    def optimizer_shards(self) -> list[OptimizerShard]:
        """This rank's optimizer state as ranges, which are live views. Not collective."""
        ...

    def load_shards(self, read: ReadShard) -> None:
        """Fill the optimizer's state: call `read` for each of this rank's ranges. Not collective.

        The weights must already be loaded. CheckpointError if the state does not belong to them.
        """
        ...
