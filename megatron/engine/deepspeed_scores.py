"""Scoring with DeepSpeed's pipeline: its inference schedule, with a scoring function in place of the loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megatron.engine.batches import ScoreBatch
from megatron.engine.deepspeed_module import LlamaPipelineModule
from megatron.model.scores import TokenScores


def pipeline_scores(
    engine: PipelineEngine, module: LlamaPipelineModule, batches: Iterable[ScoreBatch] | None, num_micro_batches: int
) -> list[Tensor]:
    """Scores of every micro-batch on the last stage; empty on the others. Collective.

    All micro-batches of the call share one pipelined pass, so that all stages work at the same time.
    """
    score = TokenScores(module.tensor_parallel.group, module.args.vocab_size)
    scores: list[Tensor] = []

    def collect(logits: Tensor, queries: tuple[Tensor, Tensor]) -> Tensor:
        scores.append(score(logits, queries))
        return logits.new_zeros(())  # the engine sums losses; scores of different widths cannot be summed

    def fitting(tokens: Tensor) -> Tensor:
        """Pad on the right to a length that sequence parallelism can divide into slices."""
        return F.pad(tokens, (0, module.tensor_parallel.padded_length(tokens.shape[1]) - tokens.shape[1]))

    data = None if batches is None else ((fitting(batch.tokens), (batch.at, batch.queried)) for batch in batches)
    before, module.loss_fn = module.loss_fn, collect
    _forget_shapes(engine)
    try:
        engine.eval_batch(data, reduce_output=None, bcast_loss=False, num_micro_batches=num_micro_batches)
    finally:
        module.loss_fn = before
        _forget_shapes(engine)
    return scores


def _forget_shapes(engine: PipelineEngine) -> None:
    """Reset state between calls: the engine would not exchange new shapes, and would add to the previous outputs."""
    engine.reset_activation_shape()
    engine.total_loss = None
