"""Finds the CPUs that a rank may run on, and checks that they are enough and close to its GPU."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.common.errors import ConfigError
from megatron.parallel.gpu_placement import Seat


@dataclass(frozen=True)
class Cpus:
    """CPUs (hardware threads) of one rank and their NUMA domains, both as numbered by the kernel."""

    cpus: tuple[int, ...]
    domains: tuple[int, ...]


def own_cpus(nodes: Path = Path("/sys/devices/system/node")) -> Cpus:
    """The CPUs that this process is bound to; no domains if the kernel does not list them."""
    bound = os.sched_getaffinity(0)
    domains = []
    for path in nodes.glob("node[0-9]*"):
        try:
            cpus = expand_cpus((path / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if bound & cpus:
            domains.append(int(path.name.removeprefix("node")))
    return Cpus(tuple(sorted(bound)), tuple(sorted(domains)))


def expand_cpus(text: str) -> set[int]:
    """The CPU numbers in a list of the kernel such as `0-7,64-71`. Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def check_cpus(seats: Sequence[Seat], cpus: Mapping[int, Cpus]) -> None:
    """Raise ConfigError if the GPU ranks of a node share fewer CPUs than there are ranks. `cpus` is keyed by rank.

    srun without --cpus-per-task, or torchrun as an srun task, binds all of them to one core: the job then runs tens of
    times slower, without an error.
    """
    by_node: dict[str, list[Seat]] = defaultdict(list)
    for seat in seats:
        if seat.device is not None:
            by_node[seat.node].append(seat)
    for node, members in by_node.items():
        shared = {cpu for seat in members for cpu in cpus[seat.rank].cpus}
        if len(shared) < len(members):
            listed = ", ".join(map(str, sorted(shared)))
            raise ConfigError(
                f"the {len(members)} ranks on {node} are bound to {len(shared)} CPUs ({listed}) together; give each "
                f"rank its own (srun --cpus-per-task=7 on Frontier and LUMI), and do not start torchrun with srun"
            )


def far_from_gpu(seats: Sequence[Seat], numa: Mapping[int, int | None], cpus: Mapping[int, Cpus]) -> list[Seat]:
    """Ranks that have no CPU in their GPU's NUMA domain, as far as the kernel lists domains."""
    far = []
    for seat in seats:
        domain, of_cpus = numa.get(seat.rank), cpus[seat.rank].domains
        if domain is not None and of_cpus and domain not in of_cpus:
            far.append(seat)
    return far
