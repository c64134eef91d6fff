"""DeepSpeed's own checkpoint files: the meta file of each stage and tp_rank, and safe reading and writing.

The meta file has the content that DeepSpeed's engine writes, so that DeepSpeed's tools can read it. DeepSpeed's save
and load are not used: they wait in barriers for ranks that have failed, and load with `weights_only=False`.
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
    LossScaler,  # static loss scale, also present in fp32
    DynamicLossScaler,  # fp16's loss scale
    ZeroStageEnum,  # the ZeRO stage
)


def meta_content(engine: PipelineEngine) -> dict[str, Any]:
    """The content that DeepSpeed writes to `mp_rank_KK_model_states.pt` of a pipeline with ZeRO; `module` is None."""
    return engine._common_checkpoint_state(None, zero_optimizer_state=True, save_frozen_param=False)


class SafeCheckpointEngine(CheckpointEngine):
    """Makes a DeepSpeed engine's own `save_checkpoint` and `load_checkpoint` fsync their files and load no code.

    Assign it to `engine.checkpoint_engine` after `deepspeed.initialize`: no configuration key selects it.
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
