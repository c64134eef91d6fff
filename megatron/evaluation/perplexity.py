"""Validation: the loss of each data source apart, over the same tokens whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.common.errors import UserError
from megatron.data.sample import SampleDataset
from megatron.neox_arguments import NeoXArgs
from megatron.trainer.batches import assemble, evaluation_micro_batches


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per learned token of one source, nats."""

    loss: float
    learned_tokens: int
    samples: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    engine: PipelineEngine, args: NeoXArgs, dataset: SampleDataset, max_samples: int | None = None
) -> Evaluation:
    """Loss over the first samples of `dataset` (all of them by default). Collective over all ranks.

    The engine's training state is untouched: a run with and without evaluations gives the same weights.
    """
    samples = min(len(dataset), max_samples) if max_samples is not None else len(dataset)
    if samples == 0:
        raise UserError("the validation set has no samples; it needs at least seq_length + 1 tokens")
    reads_data = engine.is_first_stage() or engine.is_last_stage()
    micro, dp = args.train_micro_batch_size_per_gpu, args.data_parallel_size
    rounds = -(-samples // (micro * dp))
    batch = assemble(
        evaluation_micro_batches(dataset, samples, micro, engine.grid.data_parallel_id, dp) if reads_data else None,
        rounds,
        dp,
        counts_tokens=engine.is_last_stage() and engine.grid.get_slice_parallel_rank() == 0,
        device=engine.device,
        what="validation",
    )
    loss = engine.eval_batch(batch.iterator, num_micro_batches=rounds)
    return Evaluation(float(loss), batch.learned_tokens, samples)


def evaluate_all(
    engine: PipelineEngine, args: NeoXArgs, datasets: Mapping[str, SampleDataset], max_samples: int | None = None
) -> dict[str, Evaluation]:
    """`evaluate` for every source, by name."""
    return {name: evaluate(engine, args, dataset, max_samples) for name, dataset in datasets.items()}
