"""DeepSpeed's own files of a checkpoint: the meta file of a stage's tensor rank, and a safe way to read and write
files.

The meta file's content is what DeepSpeed's engine writes, so that its tools read it. DeepSpeed's save and load are not
used: they wait in barriers for ranks that failed, and load with `weights_only=False`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

# All classes that DeepSpeed's optimizer files may contain in addition to tensors and plain values; constructing them
# has no side effects.
OPTIMIZER_CLASSES: tuple[type, ...] = (
    fragment_address,  # position of a parameter in the flat fp32 partition
    LossScaler,  # the loss scale, in fp32 too
    DynamicLossScaler,  # and one that moves
    ZeroStageEnum,  # an int with a name
)


def meta_content(engine: PipelineEngine) -> dict[str, Any]:
    """The content that DeepSpeed puts into `mp_rank_KK_model_states.pt` of a pipeline with ZeRO; `module` is None."""
    return engine._common_checkpoint_state(None, zero_optimizer_state=True, save_frozen_param=False)


class SafeCheckpointEngine(CheckpointEngine):
    """Makes a DeepSpeed engine's own `save_checkpoint` and `load_checkpoint` sync their files and load no code.

    Assign it to `engine.checkpoint_engine` after `deepspeed.initialize`; no configuration key does it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        with open(path, "wb") as file:
            torch.save(state_dict, file)
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: str, map_location: torch.device | str | None = None) -> Any:
        with torch.serialization.safe_globals(list(OPTIMIZER_CLASSES)):
            return torch.load(path, map_location="cpu", weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True
