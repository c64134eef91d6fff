"""The micro-batches of one engine call, and the weight of their losses, computed before the forward pass.

Only the first stage reads tokens and only the last reads labels, but every rank must know how many tokens of the global
batch have a target: the last stage's data-parallel replicas count theirs, and an all-reduce sums the counts. A batch
without a target is refused on all ranks at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.common.errors import UserError
from megatron.common.labels import IGNORE_INDEX
from megatron.model.loss import step_weight
from megatron.parallel.place import Place

MicroBatch = Mapping[str, Tensor]
"""Text: tokens and labels [b, s], and positions [b, s] if documents are isolated. Images: patches and targets
[b, s, values], and mask [b, s]."""


PADDING = {"tokens": 0, "labels": IGNORE_INDEX, "positions": 0, "patches": 0, "targets": 0, "mask": 0}
_PER_VALUE = ("patches", "targets")


def sequence(micro_batch: MicroBatch) -> Tensor:
    """The input sequence: tokens [b, s], or patches [b, s, values]."""
    return micro_batch["patches"] if "patches" in micro_batch else micro_batch["tokens"]


def model_inputs(micro_batch: MicroBatch) -> Tensor | tuple[Tensor, Tensor]:
    """The first layer's input: the sequence, paired with positions if documents are isolated."""
    if "positions" in micro_batch:
        return sequence(micro_batch), micro_batch["positions"]
    return sequence(micro_batch)


def loss_targets(micro_batch: MicroBatch, weight: Tensor) -> tuple[Tensor, ...]:
    """The targets that `megatron.model.pipeline.training_loss` compares with the last layer's outputs."""
    if "targets" in micro_batch:
        return micro_batch["targets"], micro_batch["mask"], weight
    return micro_batch["labels"], weight


def num_learned(micro_batch: MicroBatch) -> int:
    """Number of tokens or patches that have a target."""
    if "mask" in micro_batch:
        return int(micro_batch["mask"].sum())
    return int(micro_batch["labels"].ne(IGNORE_INDEX).sum())


def padded(micro_batch: MicroBatch, length: int) -> MicroBatch:
    """Pad the sequences of `micro_batch` on the right to `length` tokens.

    Padding has no target, and no token before it attends to it. Its position of 0 makes each padded token a document.
    """
    missing = length - sequence(micro_batch).shape[1]
    if missing == 0:
        return micro_batch
    return {
        name: F.pad(tensor, (0, 0, 0, missing) if name in _PER_VALUE else (0, missing), value=PADDING[name])
        for name, tensor in micro_batch.items()
    }


@dataclass(frozen=True)
class ScoreBatch:
    """Token ids [b, s] to score: the log-probability of the tokens `queried` [b, k] after the positions `at` [b, k].

    Rows with fewer than k queries are filled with IGNORE_INDEX in `queried`, and any valid position in `at`.
    """

    tokens: Tensor
    at: Tensor
    queried: Tensor


class EmptyBatchError(UserError):
    """No token of the global batch has a target."""


@dataclass(frozen=True)
class StepBatch:
    """The batch of one engine call, as this rank has it.

    `micro_batches` are this data-parallel rank's, None on stages that read no data. The loss of each micro-batch,
    summed over its learned tokens, is multiplied by `weight` (fp32 []), so that the mean over all micro-batches of the
    global batch is the mean over its learned tokens.
    """

    micro_batches: Iterable[MicroBatch] | None
    num_micro_batches: int
    learned_tokens: int
    weight: Tensor


def assemble_step(micro_batches: list[MicroBatch] | None, num_micro_batches: int, place: Place, what: str) -> StepBatch:
    """Count the global batch's learned tokens and derive the weight of its losses. Collective over all ranks.

    Args:
        micro_batches: this rank's part, or None on stages that read no data.
        num_micro_batches: number of micro-batches per data-parallel rank.
        what: names the batch in the error, e.g. "training step 12".
    """
    learned = torch.zeros((), dtype=torch.int64, device=place.device)
    if place.counts_tokens:
        assert micro_batches is not None
        learned += sum(map(num_learned, micro_batches))
    dist.all_reduce(learned)
    total = int(learned)
    if total == 0:
        raise EmptyBatchError(
            f"{what}: no token of the global batch has a target (every label is {IGNORE_INDEX}; of images, every patch "
            "is blank). Check the label files, masks or images of this part of the data"
        )
    return StepBatch(micro_batches, num_micro_batches, total, step_weight(total, num_micro_batches * place.dp))
