"""A rank's coordinates in the TP x PP x DP grid, and properties derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.parallel.gpu_placement import coordinates

if TYPE_CHECKING:
    import torch

    from megatron.neox_arguments import NeoXArgs


@dataclass(frozen=True)
class Place:
    """Global and node-local rank, device, the rank's number in each parallel group, and the sizes of the groups."""

    rank: int
    local_rank: int
    device: torch.device
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp: int
    pp: int
    dp: int

    @classmethod
    def of(cls, args: NeoXArgs, rank: int, local_rank: int, device: torch.device) -> Place:
        """The place of global rank `rank`: pipeline outermost, then data, tensor innermost, as in GPT-NeoX."""
        sizes = (args.pipe_parallel_size, args.data_parallel_size, args.model_parallel_size)
        pp_rank, dp_rank, tp_rank = coordinates(rank, *sizes)
        pp, dp, tp = sizes
        return cls(rank, local_rank, device, tp_rank, pp_rank, dp_rank, tp, pp, dp)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def sizes(self) -> dict[str, int]:
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp}

    @property
    def model_rank(self) -> int:
        """Number of this rank among those of one model replica, stage by stage: DeepSpeed's `mp_rank`."""
        return self.pp_rank * self.tp + self.tp_rank

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def reads_data(self) -> bool:
        """True on the first stage, which reads tokens, and on the last, which reads labels."""
        return self.first_stage or self.last_stage

    @property
    def counts_tokens(self) -> bool:
        """True on exactly one rank of each data-parallel replica, which reads labels."""
        return self.last_stage and self.tp_rank == 0
