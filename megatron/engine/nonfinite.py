"""Handling of a step whose loss or gradient is not finite, from the loss to the end of the run.

1. **Poison.** An overflow in the loss alone leaves gradients that look right. `poisoned` turns them into NaN, so that
   the gradients alone decide, identically on all ranks and without extra communication before the optimizer.
2. **Propagate.** An engine decides by the norm of all gradients, which counts a parameter replicated over
   tensor-parallel ranks only on the first of them. A NaN in another rank's copy (from a faulty GPU) would go unnoticed
   and be applied. `propagate` copies it into that rank's sharded gradients, which are in the norm.
3. **Refuse.** The engine leaves weights, moments and step count as they are; `StepResult.applied` is then False.
4. **Count.** `report_skipped` names the samples and the replica, and ends the run beyond a limit.
5. **Stop.** `check_finite` ends the run if a step that was applied reports a non-finite loss or norm: then one of the
   above has failed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.common.errors import UserError
from megatron.engine.protocol import StepResult
from megatron.parallel.collective_errors import gather_by_rank
from megatron.parallel.place import Place


class SuspiciousLossError(UserError):
    """A continued run starts with the loss of a random model, or a loss is not finite."""


class SkipLimitError(SuspiciousLossError):
    """More optimizer steps had a loss or gradient that is not finite than the configuration allows."""


def poisoned(loss: Tensor) -> Tensor:
    """Return `loss`, with NaN gradients if it is not finite."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


@torch.no_grad()
def propagate(replicated: Sequence[Tensor], sharded: Sequence[Tensor]) -> None:
    """Make this rank's sharded gradients NaN if one of its replicated gradients is not finite.

    Neither communicates nor waits for the GPU.
    """
    if not replicated or not sharded:
        return
    finite = torch.stack([gradient.isfinite().all() for gradient in replicated]).all()
    factor = torch.where(finite, 1.0, torch.nan)
    for gradient in sharded:
        gradient.view(-1)[:1].mul_(factor)


@dataclass(frozen=True)
class SkipLimits:
    """How many steps may be skipped before a run stops."""

    in_a_row: int
    total: int


def report_skipped(
    result: StepResult,
    place: Place,
    iteration: int,
    samples: tuple[int, int],
    in_a_row: int,
    total: int,
    limits: SkipLimits,
) -> str:
    """The log line for a step that was not applied, on `samples` [first, end). Collective.

    `in_a_row` and `total` include this step. Raises SkipLimitError on all ranks if either exceeds its limit.
    """
    what = (
        f"iteration {iteration}: loss {result.loss}, gradient norm not finite ({_origin(result, place)}); its samples "
        f"are [{samples[0]}, {samples[1]})"
    )
    if in_a_row > limits.in_a_row or total > limits.total:
        raise SkipLimitError(
            f"{what}. The update is not applied, and the run stops: skipped steps in a row: {in_a_row} (at most "
            f"{limits.in_a_row}, max_skipped_steps_in_a_row), in total: {total} (at most {limits.total}, "
            f"max_skipped_steps). If the data are to blame, continue from the last checkpoint with skip_sample_ranges; "
            f"if it is always the same replica, exclude its node; otherwise lower the learning rate"
        )
    return f"{what}. The update is skipped, weights and optimizer are unchanged; {in_a_row} in a row, {total} in total"


def _origin(result: StepResult, place: Place) -> str:
    """Text naming the data-parallel replicas that computed a non-finite loss. Collective."""
    own = result.replica_loss
    broken = place.dp_rank if own is not None and not math.isfinite(own) else None
    replicas = sorted({replica for replica in gather_by_rank(broken) if replica is not None})
    if not replicas:
        return "every replica's loss is finite: it arose in the backward pass"
    return f"not finite in replica {', '.join(map(str, replicas))} of {place.dp} data-parallel replicas"


def check_finite(result: StepResult, iteration: int) -> None:
    """Raise SuspiciousLossError if an applied step reports a non-finite loss or norm; no checkpoint has it yet."""
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise SuspiciousLossError(
            f"iteration {iteration}: loss {result.loss}, gradient norm {result.grad_norm}. The run stops before it "
            "saves broken weights; resume from the last checkpoint with a lower learning rate or other data"
        )
