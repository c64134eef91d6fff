"""Devices, nodes and coordinates of all ranks, up to the 2,048 of AstroSage-70B."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from megatron.neox_arguments import ConfigError
from megatron.parallel.gpu_placement import (
    CLOSEST_GCDS,
    Seat,
    check_devices,
    check_masks,
    check_tensor_groups,
    coordinates,
    device_index,
    seat_summary,
    seat_table,
)
from tests.support.mi250x_node import NUMA_OF_GCD

pytestmark = pytest.mark.unit

PP, DP, TP = 8, 32, 8


def seats(
    pipe: int = PP,
    data: int = DP,
    tensor: int = TP,
    per_node: int = 8,
    cyclic: bool = False,
    gcds: Sequence[int] = CLOSEST_GCDS,
) -> list[Seat]:
    """Ranks numbered node by node, or (cyclic) assigned to the nodes in turn; `gcds` is indexed by local rank."""
    world = pipe * data * tensor
    nodes = world // per_node
    places = []
    for rank in range(world):
        node, local = (rank % nodes, rank // nodes) if cyclic else (rank // per_node, rank % per_node)
        where = coordinates(rank, pipe, data, tensor)
        places.append(Seat(rank, f"frontier{node:05d}", local, *where, f"gcd{gcds[local % 8]}"))
    return places


def test_coordinates_are_deepspeed_s() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=PP, num_mp=TP, num_dp=DP)
    for rank in range(2048):
        theirs = topology.get_coord(rank)
        assert coordinates(rank, PP, DP, TP) == (theirs.pipe, theirs.data, theirs.model), rank
    with pytest.raises(ValueError, match="rank 2048"):
        coordinates(2048, PP, DP, TP)


def test_all_tensor_parallel_groups_of_2048_ranks_are_inside_a_node() -> None:
    all_seats = seats()
    check_tensor_groups(all_seats)
    check_devices(all_seats)
    assert seat_summary(all_seats) == (
        "ranks: 2048 on 256 nodes (frontier00000 to frontier00255), 8 on each; every tensor-parallel group is inside "
        "one node"
    )


LUMI_GCDS = tuple(range(8))  # all visible, and local rank n takes GCD n


@pytest.mark.parametrize("gcds", [CLOSEST_GCDS, LUMI_GCDS])
def test_2048_ranks_with_either_binding(gcds: Sequence[int]) -> None:
    """Every GCD of every node once, a TP group on one node, pipeline neighbors 32 nodes apart."""
    all_seats = seats(gcds=gcds)
    check_tensor_groups(all_seats)
    check_devices(all_seats)
    assert len({(seat.node, seat.device) for seat in all_seats}) == 2048
    assert len({(seat.pipe, seat.data, seat.tensor) for seat in all_seats}) == 2048
    for seat in all_seats:
        assert seat.node == f"frontier{seat.pipe * 32 + seat.data:05d}"
        assert seat.device == f"gcd{gcds[seat.tensor]}"


def test_two_link_bridges_of_groups_of_four() -> None:
    """Frontier's user guide: only OLCF's order puts a two-link pair (0-6, 2-4) into each TP group of four."""
    pairs = ({0, 6}, {2, 4})
    for gcds, bridged in ((CLOSEST_GCDS, True), (LUMI_GCDS, False)):
        groups = [set(gcds[:4]), set(gcds[4:])]
        assert all(any(pair <= group for pair in pairs) for group in groups) is bridged


@pytest.mark.parametrize(("tensor", "data"), [(1, 256), (2, 128), (4, 64)])
def test_smaller_groups_share_a_node(tensor: int, data: int) -> None:
    check_tensor_groups(seats(data=data, tensor=tensor))


def test_cyclic_numbering_tears_groups_apart() -> None:
    with pytest.raises(ConfigError, match=r"256 of 256 tensor-parallel groups leave their node.*--distribution=block"):
        check_tensor_groups(seats(cyclic=True))


def test_nodes_of_six_ranks_tear_groups_apart() -> None:
    with pytest.raises(ConfigError, match="leave their node"):
        check_tensor_groups(seats(pipe=3, data=2, per_node=6))


def test_two_ranks_with_one_device_stop() -> None:
    """`--gpu-bind=closest` causes this in a program that uses device LOCAL_RANK modulo the visible devices."""
    wrong = [Seat(rank, "n0", rank, 0, 0, rank, "0000:d1:00.0") for rank in range(2)]
    with pytest.raises(ConfigError, match=r"ranks 0 and 1 on n0 have taken the same GPU 0000:d1:00\.0"):
        check_devices(wrong)
    check_devices([Seat(rank, f"n{rank}", 0, 0, 0, rank, "0000:d1:00.0") for rank in range(2)])
    check_devices([Seat(rank, "n0", rank, 0, 0, rank, None) for rank in range(2)])


OLCF = [({"ROCR_VISIBLE_DEVICES": str(gcd)}, local, 1, 0) for local, gcd in enumerate(CLOSEST_GCDS)]
LUMI_MASKS = [({}, local, 8, local) for local in range(8)]
LUMI_WRAPPER = [({"ROCR_VISIBLE_DEVICES": str(local)}, local, 1, 0) for local in range(8)]
ALL_NAMED = [({"ROCR_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, local, 8, local) for local in range(8)]


@pytest.mark.parametrize(("env", "local", "visible", "expected"), [*OLCF, *LUMI_MASKS, *LUMI_WRAPPER, *ALL_NAMED])
def test_device_index_of_the_sites_binding_schemes(env: dict, local: int, visible: int, expected: int) -> None:
    assert device_index(local, 8, visible, env) == expected


@pytest.mark.parametrize(
    ("local", "ranks", "visible", "env", "said"),
    [
        (0, 8, 0, {}, "torch sees none"),
        (0, 8, 2, {}, "2 GPUs are visible to each of 8 ranks"),
        (7, None, 4, {}, "local rank 7 has no GPU: 4 are visible"),
        (3, 8, 1, {"ROCR_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "3"}, "masked twice. Unset HIP_VISIBLE_DEVICES"),
        (3, 8, 1, {"ROCR_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "3"}, "Unset CUDA_VISIBLE_DEVICES"),
        (3, 8, 1, {"HIP_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "4"}, "contradict each other"),
    ],
)
def test_impossible_settings_are_rejected(local: int, ranks: int | None, visible: int, env: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        device_index(local, ranks, visible, env)


@pytest.mark.parametrize(
    "env",
    [
        {"ROCR_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "0"},
        {"ROCR_VISIBLE_DEVICES": "4,5,6,7", "HIP_VISIBLE_DEVICES": "0,1,2,3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
        {"ROCR_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": ""},
    ],
)
def test_masks_that_fit_each_other_pass(env: dict) -> None:
    check_masks(env)


def test_the_map_of_the_node_is_olcf_s() -> None:
    """Two GCDs per NUMA domain, the four domains in the order of the cores, and thus of the local ranks."""
    assert sorted(CLOSEST_GCDS) == list(range(8))
    assert [NUMA_OF_GCD[gcd] for gcd in CLOSEST_GCDS] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Counter(NUMA_OF_GCD.values()) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_the_table_has_a_line_per_rank() -> None:
    few = seats()[:3]
    rows = [line.split() for line in seat_table(few, {0: 3, 1: None})]
    assert rows[0] == ["rank", "node", "local", "device", "numa", "pipe", "data", "tensor"]
    assert rows[1] == ["0", "frontier00000", "0", "gcd4", "3", "0", "0", "0"]
    assert rows[2] == ["1", "frontier00000", "1", "gcd5", "-", "0", "0", "1"]
    assert len(rows) == 4
