"""CPUs of ranks compared with their GPUs, using the map of the MI250X node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.neox_arguments import ConfigError
from megatron.parallel.cpu_binding import Cpus, check_cpus, expand_cpus, far_from_gpu, own_cpus
from megatron.parallel.gpu_placement import CLOSEST_GCDS, Seat
from tests.support.mi250x_node import NUMA_OF_GCD

pytestmark = pytest.mark.unit

# LUMI's user guide: eight masks that place local rank n next to GCD n.
LUMI = "0xfe000000000000,0xfe00000000000000,0xfe0000,0xfe000000,0xfe,0xfe00,0xfe00000000,0xfe0000000000"
LUMI_CPUS = (49, 57, 17, 25, 1, 9, 33, 41)  # the same page's map_cpu: the first core of each


def cpus_of_mask(mask: str) -> tuple[int, ...]:
    bits = int(mask, 16)
    return tuple(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def olcf() -> list[tuple[int, Cpus]]:
    """(GCD, CPUs) of each local rank with `-c7 --gpus-per-task=1 --gpu-bind=closest` and the first of every eight cores
    reserved: rank n has cores 8n+1 to 8n+7."""
    return [
        (CLOSEST_GCDS[n], Cpus(tuple(range(8 * n + 1, 8 * n + 8)), (8 * n // 16,))) for n in range(8)
    ]  # 16 cores per NUMA domain


def lumi() -> list[tuple[int, Cpus]]:
    """All GCDs visible, so that local rank n takes GCD n, and the guide's masks."""
    masks = [cpus_of_mask(mask) for mask in LUMI.split(",")]
    return [(n, Cpus(cpus, tuple({cpu // 16 for cpu in cpus}))) for n, cpus in enumerate(masks)]


def seats(gcds: list[int], node: str = "n0") -> list[Seat]:
    return [Seat(n, node, n, 0, 0, n, f"gcd{gcd}") for n, gcd in enumerate(gcds)]


def test_the_masks_of_lumi_follow_its_map() -> None:
    masks = [cpus_of_mask(mask) for mask in LUMI.split(",")]
    assert tuple(min(cpus) for cpus in masks) == LUMI_CPUS
    assert all(len(cpus) == 7 for cpus in masks)
    assert len({cpu for cpus in masks for cpu in cpus}) == 56
    # Each mask lies in the L3 region of eight cores whose closest GCD has the number of the local rank.
    assert [CLOSEST_GCDS[min(cpus) // 8] for cpus in masks] == list(range(8))


@pytest.mark.parametrize("scheme", [olcf, lumi])
def test_both_sites_bindings_are_near(scheme: type) -> None:
    bound = scheme()
    ranks = seats([gcd for gcd, _ in bound])
    numa = {n: NUMA_OF_GCD[gcd] for n, (gcd, _) in enumerate(bound)}
    cpus = {n: own for n, (_, own) in enumerate(bound)}
    check_cpus(ranks, cpus)
    assert far_from_gpu(ranks, numa, cpus) == []


def test_mixed_schemes_are_far() -> None:
    """OLCF's cores with LUMI's device numbers: only GCDs 2, 3 keep their domain."""
    ranks = seats(list(range(8)))
    cpus = {n: own for n, (_, own) in enumerate(olcf())}
    far = far_from_gpu(ranks, {n: NUMA_OF_GCD[n] for n in range(8)}, cpus)
    assert [seat.local_rank for seat in far] == [0, 1, 4, 5, 6, 7]


def test_a_rank_without_numa_information_is_not_far() -> None:
    ranks = seats([0, 1])
    assert far_from_gpu(ranks, {0: None, 1: 3}, {0: Cpus((1,), (0,)), 1: Cpus((9,), ())}) == []


def test_ranks_on_one_core_stop() -> None:
    ranks = seats(list(range(8)))
    crowded = {n: Cpus((0,), (0,)) for n in range(8)}
    with pytest.raises(ConfigError, match=r"the 8 ranks on n0 are bound to 1 CPUs \(0\).*--cpus-per-task=7"):
        check_cpus(ranks, crowded)
    check_cpus([Seat(n, "n0", n, 0, 0, n) for n in range(8)], crowded)  # CPU ranks may share
    check_cpus([Seat(n, f"n{n}", 0, 0, 0, n, "gcd0") for n in range(8)], crowded)  # one on each node


def test_own_cpus_come_from_the_kernel(tmp_path: Path) -> None:
    mine = os.sched_getaffinity(0)
    for domain, text in ((0, f"{min(mine)}"), (1, "4000-4003"), (2, "4100,4102-4103")):
        (tmp_path / f"node{domain}").mkdir()
        (tmp_path / f"node{domain}" / "cpulist").write_text(text + "\n")
    assert own_cpus(tmp_path) == Cpus(tuple(sorted(mine)), (0,))
    assert expand_cpus("4100,4102-4103\n") == {4100, 4102, 4103}
