"""Validation loss of each data source, over the same tokens whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.common.errors import UserError
from megatron.data.sample import SampleDataset, stack
from megatron.engine.batches import MicroBatch, assemble_step
from megatron.engine.protocol import Engine
from megatron.neox_arguments import NeoXArgs


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per learned token of one source, in nats; or per learned patch."""

    loss: float
    learned_tokens: int
    samples: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def text(self, args: NeoXArgs, digits: int) -> str:
        """One line for the log; a loss of images has no perplexity."""
        perplexity = "" if args.reads_images else f" | perplexity {self.perplexity:.{digits // 2}f}"
        return f"loss {self.loss:.{digits}f}{perplexity} | {self.learned_tokens} {args.learned_unit}"


def evaluate(engine: Engine, args: NeoXArgs, dataset: SampleDataset, max_samples: int | None = None) -> Evaluation:
    """Loss over the first samples of `dataset` (all of them by default). Collective over all ranks.

    The engine's training state is unchanged: runs with and without evaluations give the same weights.
    """
    samples = min(len(dataset), max_samples) if max_samples is not None else len(dataset)
    if samples == 0:
        raise UserError("the validation set has no samples; it needs at least seq_length + 1 tokens")
    place, micro_batch = engine.place, args.train_micro_batch_size_per_gpu
    own = None
    if place.reads_data:
        own = evaluation_micro_batches(dataset, samples, micro_batch, place.dp_rank, place.dp)
    batch = assemble_step(own, _rounds(samples, micro_batch, place.dp), place, "validation")
    return Evaluation(engine.evaluate(batch), batch.learned_tokens, samples)


def evaluate_all(
    engine: Engine, args: NeoXArgs, datasets: Mapping[str, SampleDataset], max_samples: int | None = None
) -> dict[str, Evaluation]:
    """`evaluate` for every source, by name; no source if `max_samples` is 0."""
    if max_samples == 0:
        return {}
    return {name: evaluate(engine, args, dataset, max_samples) for name, dataset in datasets.items()}


def evaluation_micro_batches(
    dataset: SampleDataset, samples: int, micro_batch: int, dp_rank: int, dp_size: int
) -> list[MicroBatch]:
    """This rank's micro-batches of the first `samples` samples, which appear once over all data-parallel ranks.

    The last micro-batches are padded with samples that have no targets, so that the mean is over the same tokens for
    every data-parallel size.
    """
    batches: list[MicroBatch] = []
    for index in range(_rounds(samples, micro_batch, dp_size)):
        first = (index * dp_size + dp_rank) * micro_batch
        numbers = range(first, first + micro_batch)
        batches.append(stack([dataset[i] if i < samples else dataset.padding() for i in numbers]))
    return batches


def _rounds(samples: int, micro_batch: int, dp_size: int) -> int:
    """Number of micro-batches per data-parallel rank."""
    return -(-samples // (micro_batch * dp_size))
