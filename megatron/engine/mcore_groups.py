"""The process groups of engine: megatron, created once and passed to megatron-core.

megatron-core's own `initialize_model_parallel` makes every group with a call on every rank: 6,161 calls at 2,048 ranks,
each of which splits a communicator under NCCL or RCCL with a bound device. Here one call makes all groups of a kind,
such as all tensor-parallel groups: about ten calls, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron.parallel.gpu_placement import coordinates
from megatron.parallel.neighbors import neighbor_rounds
from megatron.parallel.place import Place
from megatron.parallel.process_groups import ModelGroups

Coordinates = tuple[int, int, int]
"""(pp_rank, dp_rank, tp_rank)."""


@dataclass(frozen=True)
class Link:
    """A group of two ranks, one of which only sends and the other only receives; `peer` is the other global rank."""

    group: dist.ProcessGroup
    peer: int


@dataclass(frozen=True)
class Links:
    """A rank's links to its neighbors in the pipeline; None where there is no neighbor.

    Hidden states go from each stage to the next, gradients in the opposite direction. With virtual stages the last
    stage is followed by the first.
    """

    hidden_in: Link | None = None
    hidden_out: Link | None = None
    gradient_in: Link | None = None
    gradient_out: Link | None = None


@dataclass(frozen=True)
class EngineGroups:
    """The process groups of this rank; `alone` has only this rank, `tied` the two stages that hold a tied embedding."""

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipe: dist.ProcessGroup
    model: dist.ProcessGroup
    alone: dist.ProcessGroup
    tied: dist.ProcessGroup | None
    links: Links

    @classmethod
    def make(cls, place: Place, tied: bool, virtual: bool, timeout_minutes: int) -> EngineGroups:
        """Create the groups. Collective over all ranks."""
        maker = _Maker(place, timeout_minutes)
        ends = None
        if tied and place.pp > 1:
            edge = {0, place.pp - 1}
            ends = maker.group(lambda at: (at[1], at[2]) if at[0] in edge else None)
        return cls(
            tensor=maker.own(lambda at: (at[0], at[1])),
            data=maker.own(lambda at: (at[0], at[2])),
            pipe=maker.own(lambda at: (at[1], at[2])),
            model=maker.own(lambda at: (at[1],)),
            alone=maker.own(lambda at: at),
            tied=ends,
            links=_links(maker, place, virtual),
        )

    def as_model_groups(self) -> ModelGroups:
        return ModelGroups(self.tensor, self.data, self.pipe, self.tied)

    def as_mcore(self) -> ProcessGroupCollection:
        """The groups in the form expected by megatron-core's schedules, DistributedDataParallel and
        DistributedOptimizer."""
        return ProcessGroupCollection(
            tp=self.tensor,
            pp=self.pipe,
            dp=self.data,
            dp_cp=self.data,
            cp=self.alone,
            ep=self.alone,
            expt_dp=self.alone,
            mp=self.model,
            embd=self.tied,
            pos_embd=None,
            intra_dist_opt=whole_world(),
        )


def whole_world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "no process group is initialized"
    return world


class _Maker:
    """Creates groups by kind; kinds with the same members share their groups."""

    def __init__(self, place: Place, timeout_minutes: int) -> None:
        self.place = place
        self.at = [coordinates(rank, place.pp, place.dp, place.tp) for rank in range(place.world_size)]
        self.timeout = timedelta(minutes=timeout_minutes)
        self.world = whole_world()
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}

    def group(self, kind: Callable[[Coordinates], tuple[int, ...] | None]) -> dist.ProcessGroup | None:
        """Group the ranks by `kind`, leaving out those with None; returns this rank's group. Collective."""
        members: dict[tuple[int, ...], list[int]] = {}
        for rank, at in enumerate(self.at):
            key = kind(at)
            if key is not None:
                members.setdefault(key, []).append(rank)
        parts = tuple(map(tuple, members.values()))
        if len(parts[0]) == self.place.world_size:
            return self.world
        if parts not in self._made:
            self._made[parts] = self.split(parts)
        return self._made[parts]

    def own(self, kind: Callable[[Coordinates], tuple[int, ...]]) -> dist.ProcessGroup:
        """`group` for a kind in which every rank has a group."""
        group = self.group(kind)
        assert group is not None
        return group

    def split(self, parts: Iterable[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """Create a group for each part; returns this rank's, None if it is in no part. Collective."""
        if self.world.bound_device_id is not None:  # one split of the world's communicator makes all parts
            group: dist.ProcessGroup | None = dist.split_group(
                parent_pg=self.world, split_ranks=[sorted(part) for part in parts], timeout=self.timeout
            )
            return group
        # Only members create a group, and find each other by a name that contains the number of groups which the rank
        # has created. To keep these numbers equal, a rank in no part creates a group for itself.
        own = next((part for part in parts if self.place.rank in part), None)
        made = dist.new_group(sorted(own or [self.place.rank]), timeout=self.timeout, use_local_synchronization=True)
        return made if own else None


def _links(maker: _Maker, place: Place, virtual: bool) -> Links:
    """Links of this rank, created in rounds: in each, a rank pairs with at most one neighbor."""
    found: dict[str, Link] = {}
    for pairs in neighbor_rounds(place.pp, place.dp * place.tp, closed=virtual):
        own = next((pair for pair in pairs if place.rank in pair), None)
        for kind in ("hidden", "gradient"):
            group = maker.split(pairs)
            if own is None or group is None:
                continue
            before, after = own
            sends = (place.rank == before) == (kind == "hidden")
            found[f"{kind}_out" if sends else f"{kind}_in"] = Link(group, after if place.rank == before else before)
    return Links(**found)
