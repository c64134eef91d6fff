"""Periodic check that replicated parameters are bit-identical on all ranks that hold them.

Data-parallel replicas hold the same stage, tensor-parallel ranks the same norms, and two stages a tied embedding. A
faulty GPU, or a wrong reduction, makes them diverge without showing in the loss (and an export that averages would hide
it). Each tensor's bits are summed; the sums of a group are compared by one small all-reduce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron import layout
from megatron.engine.protocol import Engine
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import gather_by_rank
from megatron.supervision.failures import LostRanks
from megatron.supervision.status_store import nodes_of, titled

Groups = list[tuple[tuple[int, ...], dict[str, int]]]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TENSORS_SHOWN = 3


class ReplicasDifferError(LostRanks):
    """Replicated parameters have diverged; `nodes` are those of the ranks that disagree with most of their group."""


def bit_sum(tensor: Tensor) -> Tensor:
    """int64 [] that changes with any single bit of `tensor`: its elements' bits as integers, summed modulo 2^64."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


class Replicas:
    """This rank's parameters and the ranks that hold copies of them. `titles` are `gather_titles`'."""

    def __init__(self, engine: Engine, args: NeoXArgs, titles: list[str]) -> None:
        self.engine, self.device, self.titles = engine, engine.place.device, titles
        self.tensors: list[tuple[str, nn.Parameter]] = []
        replicated: list[int] = []
        tied: list[int] = []
        for index, layer in self._layers():
            for tensor_name, parameter in layer.named_parameters():
                if layout.row_of(index, tensor_name, args.whole_shape).replicated:
                    replicated.append(len(self.tensors))
                if args.shape.tied and index == layout.EMBEDDING_INDEX:
                    tied.append(len(self.tensors))
                self.tensors.append((_title(index, tensor_name, args.shape.tied), parameter))
        # Which of this rank's tensors each group holds copies of.
        self.groups: list[tuple[dist.ProcessGroup, list[int]]] = [
            (engine.groups.data, list(range(len(self.tensors)))),
            (engine.groups.tensor, replicated),
        ]
        if engine.groups.tied is not None:
            self.groups.append((engine.groups.tied, tied))

    def _layers(self) -> list[tuple[int, nn.Module]]:
        return [*self.engine.numbered_layers(), *self.engine.tied_copies()]

    def name(self, rank: int) -> str:
        return titled(rank, self.titles)

    def check(self, iteration: int) -> None:
        """Compare all replicas. Collective over all ranks; ReplicasDifferError on all of them if any differ."""
        self._layers()  # an engine may gather the weights of the last step only when they are accessed
        sums = torch.stack([bit_sum(parameter) for _, parameter in self.tensors])
        differs = torch.zeros((), dtype=torch.int64, device=self.device)
        for group, which in self.groups:
            if not which or dist.get_world_size(group) == 1:
                continue
            mine = sums[which]
            extremes = torch.cat([mine, ~mine])  # ~x falls where x rises, and never overflows
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
            highest, inverted_lowest = extremes.chunk(2)
            differs |= highest.ne(~inverted_lowest).any()
        dist.all_reduce(differs, op=dist.ReduceOp.MAX)
        if differs:
            raise self._error(iteration, sums)

    def _error(self, iteration: int, sums: Tensor) -> ReplicasDifferError:
        """Which tensors differ, and on which ranks: those that disagree with most of their group. Collective."""
        mine: Groups = [
            (tuple(dist.get_process_group_ranks(group)), {self.tensors[i][0]: int(sums[i]) for i in which})
            for group, which in self.groups
        ]
        found = sorted(set(differences(gather_by_rank(mine))))
        lines = [self._line(*difference) for difference in found[:TENSORS_SHOWN]]
        more = f"; and {len(found) - TENSORS_SHOWN} more tensors" if len(found) > TENSORS_SHOWN else ""
        guilty = {rank for _, odd, others in found if len(odd) < len(others) for rank in odd}
        return ReplicasDifferError(
            f"iteration {iteration}: replicated parameters have diverged: {'; '.join(lines)}{more}. The run stops "
            f"before it saves them; resume from the last checkpoint, without the node if one is to blame",
            nodes_of(guilty, self.titles),
            first=dist.get_rank() == 0,
        )

    def _line(self, tensor: str, odd: tuple[int, ...], others: tuple[int, ...]) -> str:
        who, rest = " and ".join(map(self.name, odd)), ", ".join(map(str, others))
        if len(odd) < len(others):
            return f"{tensor} on {who} differs from that on ranks {rest}"
        return f"{tensor} on {who} differs from that on {' and '.join(map(self.name, others))}"


def _title(index: int, tensor_name: str, tied: bool) -> str:
    if tied and index == layout.EMBEDDING_INDEX:
        return "tied embedding"
    return f"layer {index} {tensor_name}"


def differences(told: list[Groups]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(tensor, ranks that disagree with most of their group, the others), from what every rank holds: by group, its
    members and the sums of the tensors that they share."""
    known = [
        {(members, tensor): value for members, sums in groups for tensor, value in sums.items()} for groups in told
    ]
    for key in dict.fromkeys(key for rank in known for key in rank):
        members, tensor = key
        values = {member: known[member][key] for member in members}
        usual, _ = Counter(values.values()).most_common(1)[0]
        odd = tuple(member for member in members if values[member] != usual)
        if odd:
            yield tensor, odd, tuple(member for member in members if member not in odd)
