"""The groups of engine: megatron: members agree on each, few calls create them, and links have one direction."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.engine import mcore_groups
from megatron.engine.mcore_groups import EngineGroups, Link
from megatron.parallel.gpu_placement import coordinates
from megatron.parallel.place import Place

pytestmark = pytest.mark.unit

Split = tuple[int, int, int]  # TP, PP, DP


@dataclass(frozen=True)
class Made:
    """A group requested from `new_group`: its members, and the number of groups this rank created before."""

    ranks: tuple[int, ...]
    turn: int


def place_of(rank: int, split: Split) -> Place:
    tp, pp, dp = split
    pp_rank, dp_rank, tp_rank = coordinates(rank, pp, dp, tp)
    return Place(rank, rank, torch.device("cpu"), tp_rank, pp_rank, dp_rank, tp, pp, dp)


def groups_of(rank: int, split: Split, tied: bool, virtual: bool) -> tuple[EngineGroups, list[Made]]:
    """The groups one rank gets, and all groups it created."""
    made: list[Made] = []

    def new_group(ranks: list[int], **options: Any) -> Made:
        assert options["use_local_synchronization"]
        assert ranks == sorted(ranks)
        made.append(Made(tuple(ranks), len(made)))
        return made[-1]

    world = mock.Mock(bound_device_id=None)
    with (
        mock.patch.object(dist, "new_group", new_group),
        mock.patch.object(mcore_groups, "whole_world", return_value=world),
    ):
        return EngineGroups.make(place_of(rank, split), tied, virtual, 30), made


SPLITS = [(2, 2, 2), (1, 2, 1), (1, 3, 1), (1, 4, 2), (2, 5, 1), (1, 8, 1), (2, 1, 3)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize(("tied", "virtual"), [(False, False), (True, False), (True, True)])
def test_members_make_a_group_in_the_same_turn(split: Split, tied: bool, virtual: bool) -> None:
    """torch names a group by its members and a counter; ranks that disagree would deadlock."""
    world = split[0] * split[1] * split[2]
    turns = [groups_of(rank, split, tied, virtual)[1] for rank in range(world)]
    assert len({len(made) for made in turns}) == 1
    for made in turns:
        for group in made:
            assert all(turns[member][group.turn] == group for member in group.ranks)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("virtual", [False, True])
def test_a_link_has_one_sender_and_one_receiver(split: Split, virtual: bool) -> None:
    """Hidden states go to the next stage, gradients to the previous one; both ends refer to each other."""
    tp, pp, dp = split
    ends: dict[tuple[Any, str], set[tuple[int, int]]] = {}
    for rank in range(tp * pp * dp):
        links = groups_of(rank, split, tied=False, virtual=virtual)[0].links
        stage, per_stage = rank // (tp * dp), tp * dp
        for name in ("hidden_in", "hidden_out", "gradient_in", "gradient_out"):
            link: Link | None = getattr(links, name)
            kind, way = name.split("_")
            step = 1 if (kind == "hidden") == (way == "out") else -1
            has = pp > 1 and (virtual or 0 <= stage + step < pp)
            assert (link is not None) == has, name
            if link is not None:
                assert link.peer == (rank + step * per_stage) % (tp * pp * dp)
                ends.setdefault((link.group, kind), set()).add((rank, 1 if way == "out" else -1))
    for (group, _), both in ends.items():
        assert {rank for rank, _ in both} == set(group.ranks)
        assert sorted(way for _, way in both) == [-1, 1]
    carried = Counter(group for group, _ in ends)
    assert set(carried.values()) <= {1}, "no group carries both kinds"


def test_groups_are_those_of_the_layout() -> None:
    found, _ = groups_of(5, (2, 2, 2), tied=True, virtual=True)  # stage 1, replica 0, tensor rank 1
    ranks = {name: getattr(found, name).ranks for name in ("tensor", "data", "pipe", "model", "alone", "tied")}
    assert ranks == {
        "tensor": (4, 5),
        "data": (5, 7),
        "pipe": (1, 5),
        "model": (0, 1, 4, 5),
        "alone": (5,),
        "tied": (1, 5),
    }


def test_2048_ranks_take_about_ten_calls_each() -> None:
    """megatron-core's `initialize_model_parallel` makes 6,161."""
    for rank in (0, 1024, 2047):
        _, made = groups_of(rank, (8, 8, 32), tied=False, virtual=True)
        assert len(made) <= 10


def test_with_a_bound_device_one_split_makes_a_whole_kind() -> None:
    splits: list[list[list[int]]] = []

    def split_group(parent_pg: Any, split_ranks: list[list[int]], timeout: Any) -> str:
        splits.append(split_ranks)
        return "group"

    world = mock.Mock(bound_device_id=torch.device("cuda", 0))
    with (
        mock.patch.object(dist, "split_group", split_group),
        mock.patch.object(mcore_groups, "whole_world", return_value=world),
    ):
        mcore_groups.EngineGroups.make(place_of(3, (2, 4, 1)), False, True, 30)
    for parts in splits:
        flat = [rank for part in parts for rank in part]
        assert len(flat) == len(set(flat)), "parts of one split do not overlap"
    assert len(splits) <= 10
