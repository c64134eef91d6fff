"""Micro-batches of one step in the shape the pipeline engine takes, with the loss weight known before the forward.

Only the first stage reads tokens and only the last reads labels, but every rank must learn how many tokens the
global batch teaches: the last stage's data-parallel replicas count theirs and all ranks add them up. A batch that
teaches nothing is refused on all ranks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.common.errors import UserError
from megatron.common.labels import IGNORE_INDEX
from megatron.data.sample import SampleDataset, stack
from megatron.model.loss import step_weight

MicroBatch = Mapping[str, Tensor]


class EmptyBatchError(UserError):
    """No token of the global batch carries a target."""


@dataclass(frozen=True)
class StepBatch:
    """One call of the engine: `iterator` yields (inputs, targets) per micro-batch, None where no data is read."""

    iterator: Iterator[Any] | None
    learned_tokens: int


def assemble(
    micro_batches: list[MicroBatch] | None,
    num_micro_batches: int,
    data_parallel_size: int,
    counts_tokens: bool,
    device: torch.device,
    what: str,
) -> StepBatch:
    """Count the global batch's learned tokens and weigh its losses with them. Collective over all ranks.

    Args:
        micro_batches: this rank's part, or None on stages that read no data.
        counts_tokens: True on exactly one rank per data-parallel replica.
        what: names the batch in the error, e.g. "training step 12".
    """
    learned = torch.zeros((), dtype=torch.int64, device=device)
    if counts_tokens:
        assert micro_batches is not None
        learned += sum(int(batch["labels"].ne(IGNORE_INDEX).sum()) for batch in micro_batches)
    dist.all_reduce(learned)
    total = int(learned)
    if total == 0:
        raise EmptyBatchError(
            f"{what}: no token of the global batch has a target (every label is {IGNORE_INDEX}). "
            "Check the label files and masks of this part of the data"
        )
    if micro_batches is None:
        return StepBatch(None, total)
    weight = step_weight(total, num_micro_batches * data_parallel_size)
    pairs = [(_inputs(batch), (batch["labels"], weight)) for batch in micro_batches]
    return StepBatch(iter(pairs), total)


def _inputs(batch: MicroBatch) -> Tensor | tuple[Tensor, Tensor]:
    if "positions" in batch:
        return batch["tokens"], batch["positions"]
    return batch["tokens"]


def evaluation_micro_batches(
    dataset: SampleDataset, samples: int, micro_batch: int, dp_rank: int, dp_size: int
) -> list[MicroBatch]:
    """The first `samples` samples of a data set, each exactly once over the data-parallel ranks.

    What does not fill the last micro-batches is filled with samples that have no targets, so the mean is over the
    same tokens for every split.
    """
    rounds = -(-samples // (micro_batch * dp_size))
    batches: list[MicroBatch] = []
    for index in range(rounds):
        first = (index * dp_size + dp_rank) * micro_batch
        places = range(first, first + micro_batch)
        batches.append(stack([dataset[i] if i < samples else dataset.padding() for i in places]))
    return batches
