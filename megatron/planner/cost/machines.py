"""Machine constants of the planner, each defined once, with its source.

Marks: [S] read in the source, [D] derived from such numbers, [A] an assumption of ours, marked so that it can be
challenged. FUG is OLCF's Frontier user guide, OSU-LUMI a published OSU benchmark of a LUMI-G node, HUGINN arXiv
2502.05171, ORHAN eminorhan/frontier-torchtitan, LAB aniskhan25/lumi-apptainer-bench.

A "GPU" is a GCD throughout: half an MI250X, what software sees as a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron.parallel.gpu_placement import CLOSEST_GCDS

GIB = 2**30

# Pairs of GCDs by the links between them, dumped from a LUMI-G node's driver (OSU-LUMI [S]); Frontier's blade is the
# same model. Rates are the same source's, one direction, messages of a MiB and more; every other pair is routed.
SAME_PACKAGE, TWO_LINKS, ONE_LINK, ROUTED = 147.8e9, 77.1e9, 39.0e9, 69.9e9
_PAIRS: dict[tuple[int, int], float] = {
    **dict.fromkeys([(0, 1), (2, 3), (4, 5), (6, 7)], SAME_PACKAGE),
    **dict.fromkeys([(0, 6), (2, 4)], TWO_LINKS),
    **dict.fromkeys([(0, 2), (1, 3), (1, 5), (3, 7), (4, 6), (5, 7)], ONE_LINK),
}


def link_rate(a: int, b: int) -> float:
    """Bytes per second from GCD `a` to GCD `b` of a node."""
    return _PAIRS.get((min(a, b), max(a, b)), ROUTED)


LINK_NAMES = {
    SAME_PACKAGE: "links inside a package",
    TWO_LINKS: "two-link pairs",
    ONE_LINK: "one-link pairs",
    ROUTED: "routed pairs",
}


@lru_cache
def ring_rate(gcds: tuple[int, ...]) -> float:
    """Bandwidth of the slowest link, bytes per second, in the best ring through some GCDs of a node.

    A ring of direct links is used if there is one, as in RCCL; otherwise routed pairs close it.
    """
    first, *rest = sorted(gcds)
    rings = [(first, *order, first) for order in itertools.permutations(rest)]
    pairs = [[(min(edge), max(edge)) for edge in itertools.pairwise(ring)] for ring in rings]
    direct = [ring for ring in pairs if all(pair in _PAIRS for pair in ring)]
    return max(min(link_rate(*pair) for pair in ring) for ring in direct or pairs)


@lru_cache
def cut_rate(gcds: tuple[int, ...]) -> float:
    """Smallest one-way bandwidth between two parts of a group, bytes per second, over all bipartitions.

    Every ring crosses every cut, so this bounds all rings together. A routed pair counts only if no direct link crosses
    the cut.
    """
    cuts = []
    for size in range(1, len(gcds) // 2 + 1):
        for part in itertools.combinations(gcds, size):
            across = [(min(a, b), max(a, b)) for a in part for b in gcds if b not in part]
            cuts.append(sum(_PAIRS[pair] for pair in across if pair in _PAIRS) or ROUTED)
    return min(cuts)


@dataclass(frozen=True)
class Machine:
    """One kind of node, its network and its file system. Bytes, seconds and FLOP/s; rates are per GCD unless noted."""

    name: str
    gcd_of_local_rank: tuple[int, ...]  # how the site's binding numbers a node's eight ranks

    # --- one GCD
    # 383 TFLOP/s of an MI250X, halved: AMD's peak at 1.7 GHz, 110 of 110 units. [S] X-MoE, torchtitan, ml-engineering
    peak_flops: float = 191.5e12
    # Arithmetic rate of matrix kernels in long isolated loops, without their operands' traffic. With that traffic large
    # shapes reach 147 TFLOP/s and a tensor-parallel 70B's 134-147, within the published 125-147. [D] from [S] HUGINN
    # (125), AxoNN (about 125), ml-engineering (147.0, the best of all shapes tried)
    gemm_flops: float = 153e12
    # Flash attention, forward and backward, of executed (causal) FLOPs. [A]: no public MI250X figure found
    attention_forward_flops: float = 75e12
    attention_backward_flops: float = 55e12
    # 1638.4 GB/s in theory; copies and BabelStream reach 1.35 TB/s +- 4 %. [S] AMD rocm-blogs, OLCF
    hbm_rate: float = 1.35e12
    # Fraction of the isolated kernels' speed that a training step keeps: clocks under sustained power, gaps between
    # launches, slower layouts (rocBLAS's TN). Calibrated, see benchmarks/planner.py
    sustained: float = 0.84
    # Standard deviation of speed between GCDs: half of the 4 % above. A step waits for the slowest of all. [D]
    spread: float = 0.02

    # --- memory
    # What 8-10 communicators, which PyTorch's allocator does not see, leave of the driver's 63.98 GiB. [S] LAB
    usable_hbm_bytes: int = 57 * GIB
    first_communicator_bytes: int = GIB  # RCCL's first, with the context. [S] LAB
    communicator_bytes: int = 650 * 2**20  # each further one. [S] LAB

    # --- links
    # Fraction of the links' point-to-point rates that RCCL's collectives reach. Calibrated, see benchmarks/planner.py
    collective: float = 0.85
    # Four NICs of 25 GB/s a node, 23.3-24.0 measured each. [S] FUG, OSU-LUMI
    node_network_rate: float = 4 * 23.6e9
    nic_rate: float = 23.6e9
    # One hop of a ring. [D] from HUGINN: 108.75 TFLOP/s on 8 GCDs, 52-64 on 4,096, where the gradients of 3.5e9
    # parameters go round in pieces of 64 MB
    hop_seconds: float = 6.5e-6

    # --- node and site
    # A GCD's own link to its CPU, each way. [S] FUG
    host_link_rate: float = 36e9
    gpus_per_node: int = 8
    # File system, all ranks together. [A]: Orion's flash tier is far above what one job of 256 nodes is given
    file_system_rate: float = 100e9
    # Mean time between failures of one node. [A]: none is published for jobs of this size; 256 nodes then fail once
    # in 39 hours. For scale: Llama-3-405B saw one interruption per 3 hours on 2,048 nodes of 8 H100, 256 in 25 hours
    node_mtbf_seconds: float = 10_000 * 3600.0
    # From a failure to the first new step: requeue, start, load. [A]
    restart_seconds: float = 1200.0

    def gcds(self, local_ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.gcd_of_local_rank[rank] for rank in local_ranks)


# Frontier's ranks sit where `--gpu-bind=closest` puts them ([S] FUG); LUMI's CPU masks make rank = GCD ([S] LUMI-UG).
FRONTIER = Machine("frontier", gcd_of_local_rank=CLOSEST_GCDS)
LUMI = Machine("lumi", gcd_of_local_rank=tuple(range(8)))

MACHINES = {machine.name: machine for machine in (FRONTIER, LUMI)}
