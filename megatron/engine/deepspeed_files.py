"""DeepSpeed's own files of a checkpoint: the meta file of a stage's tensor rank, the optimizer file of a rank.

Contents are what DeepSpeed's engine writes, so that its tools read them; writing and reading go through `torch_files`,
which syncs, sums and refuses code. DeepSpeed's save and load are not used themselves: they wait in barriers for ranks
that failed, and load with `weights_only=False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.checkpoint.discovery import optimizer_file_name
from megatron.checkpoint.torch_files import read_file, write_file

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

# All that a file may hold besides tensors and plain values; none of them does anything when it is made.
OPTIMIZER_CLASSES: tuple[type, ...] = (
    fragment_address,  # where a parameter lies in the flat fp32 partition
    LossScaler,  # the loss scale, in fp32 too
    ZeroStageEnum,  # an int with a name
)


@dataclass(frozen=True)
class Place:
    """A rank's coordinates, and the names of the files that are its own."""

    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    bf16: bool

    @classmethod
    def of(cls, engine: PipelineEngine) -> Place:
        grid = engine.grid
        return cls(
            tp=grid.get_slice_parallel_world_size(),
            pp=grid.get_pipe_parallel_world_size(),
            dp=grid.get_data_parallel_world_size(),
            tp_rank=grid.get_slice_parallel_rank(),
            pp_rank=grid.get_pipe_parallel_rank(),
            dp_rank=grid.get_data_parallel_rank(),
            bf16=engine.bfloat16_enabled(),
        )

    @property
    def sizes(self) -> dict[str, int]:
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp}

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def meta_file(self) -> str:
        return f"mp_rank_{self.pp_rank * self.tp + self.tp_rank:02d}_model_states.pt"

    @property
    def optimizer_file(self) -> str:
        return optimizer_file_name(self.dp_rank, self.pp_rank * self.tp + self.tp_rank, self.bf16)

    def all_optimizer_files(self) -> set[str]:
        return {
            optimizer_file_name(dp_rank, k, self.bf16) for dp_rank in range(self.dp) for k in range(self.pp * self.tp)
        }


def meta_content(engine: PipelineEngine) -> dict[str, Any]:
    """What DeepSpeed puts into `mp_rank_KK_model_states.pt` of a pipeline with ZeRO; `module` is None."""
    return engine._common_checkpoint_state(None, zero_optimizer_state=True, save_frozen_param=False)


def optimizer_content(engine: PipelineEngine) -> dict[str, Any]:
    """What DeepSpeed puts into a rank's optimizer file."""
    return {
        "optimizer_state_dict": engine.optimizer.state_dict(),
        "ds_config": engine.config,
        "ds_version": deepspeed.__version__,
    }


class SafeCheckpointEngine(CheckpointEngine):
    """Makes a DeepSpeed engine's own `save_checkpoint` and `load_checkpoint` sync what they write and load no code.

    Assign it to `engine.checkpoint_engine` after `deepspeed.initialize`; no configuration key does it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        write_file(Path(path), state_dict, OPTIMIZER_CLASSES)

    def load(self, path: str, map_location: torch.device | str | None = None) -> Any:
        return read_file(Path(path), classes=OPTIMIZER_CLASSES)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True
