"""Which CPUs a rank may run on, and whether they are enough and near its GPU."""

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
    """CPUs (hardware threads) of one rank, and the NUMA domains that they are in, as the kernel numbers both."""

    cpus: tuple[int, ...]
    domains: tuple[int, ...]


def own_cpus(nodes: Path = Path("/sys/devices/system/node")) -> Cpus:
    """Those that this process is bound to; no domains where the kernel does not tell."""
    mine = os.sched_getaffinity(0)
    domains = []
    for path in nodes.glob("node[0-9]*"):
        try:
            cpus = expand_cpus((path / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if mine & cpus:
            domains.append(int(path.name.removeprefix("node")))
    return Cpus(tuple(sorted(mine)), tuple(sorted(domains)))


def expand_cpus(text: str) -> set[int]:
    """The kernel's `0-7,64-71` as numbers. Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def check_cpus(seats: Sequence[Seat], cpus: Mapping[int, Cpus]) -> None:
    """Raise ConfigError if the ranks with GPUs of a node have fewer CPUs than they are. `cpus` is by rank.

    srun without --cpus-per-task, or torchrun as a task of it, binds all of them to one core: the job then runs tens of
    times slower, without an error.
    """
    by_node: dict[str, list[Seat]] = defaultdict(list)
    for seat in seats:
        if seat.device is not None:
            by_node[seat.node].append(seat)
    for node, members in by_node.items():
        together = {cpu for seat in members for cpu in cpus[seat.rank].cpus}
        if len(together) < len(members):
            listed = ", ".join(map(str, sorted(together)))
            raise ConfigError(
                f"the {len(members)} ranks on {node} are bound to {len(together)} CPUs ({listed}) together; give each "
                f"its own (srun --cpus-per-task=7 on Frontier and LUMI), and do not start torchrun by srun"
            )


def far_from_gpu(seats: Sequence[Seat], numa: Mapping[int, int | None], cpus: Mapping[int, Cpus]) -> list[Seat]:
    """Ranks none of whose CPUs are in their GPU's NUMA domain; those of which the kernel does not tell are not."""
    far = []
    for seat in seats:
        domain, own = numa.get(seat.rank), cpus[seat.rank].domains
        if domain is not None and own and domain not in own:
            far.append(seat)
    return far
