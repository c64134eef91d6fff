"""Pairing of ranks for measurements, and detection of slow devices, links and nodes."""

from __future__ import annotations

import itertools

import pytest

from megatron.preflight.compare import compare_devices, compare_links_between, compare_links_inside
from megatron.preflight.pairings import ring_and_across, rounds_between, rounds_inside, tournament
from megatron.preflight.report import overview, slow_nodes, worst_first

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("count", range(1, 10))
def test_in_a_tournament_each_meets_each_once(count: int) -> None:
    rounds = tournament(count)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(range(count), 2))
    assert len(rounds) <= count
    for pairs in rounds:
        busy = [one for pair in pairs for one in pair]
        assert len(busy) == len(set(busy)), "nobody has two partners at once"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 32, 256])
def test_every_node_has_several_partners_in_few_rounds(count: int) -> None:
    rounds = ring_and_across(count)
    assert len(rounds) <= 4
    partners: dict[int, set[int]] = {node: set() for node in range(count)}
    for pairs in rounds:
        busy = [one for pair in pairs for one in pair]
        assert len(busy) == len(set(busy))
        for one, other in pairs:
            assert other not in partners[one], "no pair twice"
            partners[one].add(other)
            partners[other].add(one)
    assert min(map(len, partners.values())) >= min(count - 1, 2)


def test_rounds_of_ranks() -> None:
    nodes = [[0, 1], [2, 3], [4, 5]]
    assert rounds_inside(nodes) == [[(0, 1), (2, 3), (4, 5)]]
    assert rounds_between(nodes) == [[(0, 2), (1, 3)], [(2, 4), (3, 5)], [(0, 4), (1, 5)]]
    assert rounds_inside([[0], [1]]) == []
    assert rounds_between([[0, 1, 2]]) == []


NODES = [f"n{rank // 8}" for rank in range(64)]  # eight nodes of eight


def test_a_slow_device_makes_its_node_slow() -> None:
    values = [140.0 + rank % 3 for rank in range(64)]
    values[21] = 120.0
    screen = compare_devices("GEMM", "TFLOP/s", values, NODES, 0.9)
    assert screen.slow == ["n2"]
    assert screen.nodes["n2"] == 120.0
    assert screen.reason("n2") == "GEMM 0.85 of the median (rank 21)"


def test_a_slightly_slower_device_is_not_slow() -> None:
    values = [140.0] * 63 + [127.0]
    assert compare_devices("GEMM", "TFLOP/s", values, NODES, 0.9).slow == []


def test_one_node_is_never_slow() -> None:
    screen = compare_devices("GEMM", "TFLOP/s", [1.0, 140.0, 140.0], ["n0"] * 3, 0.9)
    assert screen.slow == []
    assert "n0, rank 0: 1%" in overview([screen])[1], "but its slowest device is shown"


def test_links_of_a_node_are_compared_with_the_same_links_elsewhere() -> None:
    """Four, two and one link: 148, 77 and 39 GB/s were measured between healthy GCDs of one node."""
    design = {(0, 1): 148.0, (2, 4): 77.0, (0, 2): 39.0}
    local = [rank % 8 for rank in range(64)]
    values = {(8 * n + a, 8 * n + b): rate for n in range(8) for (a, b), rate in design.items()}
    assert compare_links_inside("links", "GB/s", values, NODES, local, 0.75).slow == []
    values[8 * 5 + 2, 8 * 5 + 4] = 39.0  # as fast as other links, but half as fast as this link should be
    screen = compare_links_inside("links", "GB/s", values, NODES, local, 0.75)
    assert screen.slow == ["n5"]
    assert screen.reason("n5") == "links 0.51 of the median (ranks 42 and 44)"


def network(slow: dict[frozenset[int], float], count: int = 8) -> dict[tuple[int, int], float]:
    """20 GB/s between single-rank nodes, except for the given nodes (sets of one) and links (sets of two)."""
    values = {}
    for one, other in (pair for pairs in ring_and_across(count) for pair in pairs):
        shares = [share for who, share in slow.items() if who <= {one, other}]
        values[one, other] = 20.0 * min(shares, default=1.0)
    return values


@pytest.mark.parametrize("count", [3, 4, 5, 8, 9])
def test_a_node_that_is_slow_with_all_partners_is_slow(count: int) -> None:
    names = [f"n{node}" for node in range(count)]
    screen = compare_links_between("network", "GB/s", network({frozenset({2}): 0.5}, count), names, 0.75)
    assert screen.slow == ["n2"]
    assert screen.slow_links == []


def test_a_node_that_is_slow_with_one_partner_is_not() -> None:
    names = [f"n{node}" for node in range(8)]
    screen = compare_links_between("network", "GB/s", network({frozenset({2, 3}): 0.5}), names, 0.75)
    assert screen.slow == []
    assert screen.slow_links == ["n2 - n3: 10 GB/s, 0.50 of the median"]


def test_the_ranks_of_a_node_share_its_network() -> None:
    values = {(0, 2): 10.0, (1, 3): 12.0}
    screen = compare_links_between("network", "GB/s", values, ["n0", "n0", "n1", "n1"], 0.75)
    assert screen.nodes == {"n0": 22.0, "n1": 22.0}


def test_the_list_for_exclude_is_in_the_nodes_order_with_all_reasons() -> None:
    values = [140.0] * 64
    values[60] = values[10] = 70.0
    screens = [
        compare_devices("GEMM", "TFLOP/s", values, NODES, 0.9),
        compare_devices("copy", "GB/s", values[::-1], NODES, 0.9),
    ]
    nodes = list(dict.fromkeys(NODES))
    slow = slow_nodes(screens, nodes)
    assert list(slow) == ["n0", "n1", "n6", "n7"]
    assert slow["n1"] == "GEMM 0.50 of the median (rank 10)"
    assert set(worst_first(screens, nodes)[:4]) == set(slow)
