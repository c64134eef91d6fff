"""Scoring through DeepSpeed's pipeline: its inference schedule with another function at the end of the last stage."""

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
    """Scores of every micro-batch, on the last stage; empty on the others. Collective.

    All micro-batches of the call are in the pipeline together, so that all stages work.
    """
    score = TokenScores(module.tensor_parallel.group, module.args.vocab_size)
    scores: list[Tensor] = []

    def collect(logits: Tensor, queries: tuple[Tensor, Tensor]) -> Tensor:
        scores.append(score(logits, queries))
        return logits.new_zeros(())  # the engine adds losses up, which scores of different widths do not allow

    def fitting(tokens: Tensor) -> Tensor:
        """Padded on the right to a length divisible into the slices of sequence parallelism."""
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
    """Reset state between calls: shapes are exchanged only with a call's first message, and outputs are summed across
    calls."""
    engine.reset_activation_shape()
    engine.total_loss = None
