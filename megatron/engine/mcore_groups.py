"""The process groups of engine: megatron, created once and passed to megatron-core.

megatron-core's own `initialize_model_parallel` makes every group by a call of every rank: 6,161 calls at 2,048 ranks,
each of which splits a communicator under NCCL or RCCL with a bound device. Here one call makes a whole kind of groups,
of which a rank is in one: about ten calls, whatever the number of ranks.
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
"""A rank's number in its pipeline, among data-parallel replicas, and in its tensor-parallel group."""


@dataclass(frozen=True)
class Link:
    """A group of two ranks, one of which only sends and the other only receives; `peer` is the other's global rank."""

    group: dist.ProcessGroup
    peer: int


@dataclass(frozen=True)
class Links:
    """A rank's links to its neighbors in the pipeline; None where there is no neighbor.

    Hidden states come from the stage before and go to the next, gradients the other way. With virtual stages the last
    stage's next is the first.
    """

    hidden_in: Link | None = None
    hidden_out: Link | None = None
    gradient_in: Link | None = None
    gradient_out: Link | None = None


@dataclass(frozen=True)
class EngineGroups:
    """Groups of this rank, and a group of this rank only; `tied` joins the stages that hold a tied embedding, if two
    do."""

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipe: dist.ProcessGroup
    model: dist.ProcessGroup
    alone: dist.ProcessGroup
    tied: dist.ProcessGroup | None
    links: Links

    @classmethod
    def make(cls, place: Place, tied: bool, virtual: bool, timeout_minutes: int) -> EngineGroups:
        """Collective over all ranks."""
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
    """Makes groups by kind; kinds with the same groups share them."""

    def __init__(self, place: Place, timeout_minutes: int) -> None:
        self.place = place
        self.at = [coordinates(rank, place.pp, place.dp, place.tp) for rank in range(place.world_size)]
        self.timeout = timedelta(minutes=timeout_minutes)
        self.world = whole_world()
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}

    def group(self, kind: Callable[[Coordinates], tuple[int, ...] | None]) -> dist.ProcessGroup | None:
        """Ranks with the same `kind` share a group, those with None have none. This rank's; collective."""
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
        """The same for a kind that every rank has a group of."""
        group = self.group(kind)
        assert group is not None
        return group

    def split(self, parts: Iterable[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """The part of the world that this rank is in, as a new group; None if it is in none."""
        if self.world.bound_device_id is not None:  # one split of the world's communicator makes all parts
            group: dist.ProcessGroup | None = dist.split_group(
                parent_pg=self.world, split_ranks=[sorted(part) for part in parts], timeout=self.timeout
            )
            return group
        # Only members create a group, and find each other by a name in which torch counts the groups created by a rank.
        # To keep the counts equal, a rank that is in none creates one for itself.
        own = next((part for part in parts if self.place.rank in part), None)
        made = dist.new_group(sorted(own or [self.place.rank]), timeout=self.timeout, use_local_synchronization=True)
        return made if own else None


def _links(maker: _Maker, place: Place, virtual: bool) -> Links:
    """Links of this rank, made in rounds in which a rank has one neighbor at most: its next, or the one before."""
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
