"""Errors raised on all ranks together: all continue, or all stop with one message; none waits for a failed rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron.common.errors import CheckpointError, UserError, one_line

T = TypeVar("T")
_SHOWN = 5  # number of reasons in a message; a full disk fails on every rank of a node at once


def gather_by_rank(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks of a group (default: of the run), in the order of ranks. Collective."""
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class RankGroup:
    """Ranks that act together: their process group, the device it communicates from, and the error they raise."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, error: type[UserError] = CheckpointError
    ) -> None:
        self.group = group
        self.device = device
        self.error = error
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @classmethod
    def world(cls, device: torch.device, error: type[UserError] = CheckpointError) -> RankGroup:
        """All ranks of the run."""
        group = dist.group.WORLD
        assert group is not None
        return cls(group, device, error)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run the body on every rank; if it failed on any, all raise one `error` that names these ranks. Collective.

        The body must not communicate: a rank that fails in it would leave the others waiting.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(what, failure)

    def agree(self, what: str, failure: BaseException | None) -> None:
        """Raise the same `error` on all ranks if any of them passes a failure. Collective."""
        if not self.total(failure is not None):
            return
        reasons = gather_by_rank(None if failure is None else one_line(failure), self.group)
        ranks_by_reason: dict[str, list[int]] = {}
        for rank, reason in enumerate(reasons):
            if reason is not None:
                ranks_by_reason.setdefault(reason, []).append(rank)
        shown = [f"{_name(ranks)}: {reason}" for reason, ranks in list(ranks_by_reason.items())[:_SHOWN]]
        if len(ranks_by_reason) > _SHOWN:
            shown.append(f"and {len(ranks_by_reason) - _SHOWN} more reasons")
        raise self.error(f"{what} failed. " + "; ".join(shown)) from failure

    def total(self, number: int) -> int:
        """Sum of `number` over all ranks. Collective."""
        count = torch.tensor([int(number)], dtype=torch.int64, device=self.device)
        dist.all_reduce(count, group=self.group)
        return int(count)

    def largest(self, number: int) -> int:
        """Maximum of `number` over all ranks. Collective."""
        count = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=self.group)
        return int(count)

    def where(self, true: bool) -> str:
        """Text naming the ranks on which `true` holds, such as "ranks 1, 3". Collective."""
        return _name([rank for rank, answer in enumerate(gather_by_rank(true, self.group)) if answer])

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on all ranks. Collective."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group, device=self.device)
        return box[0]


def _name(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''}"
