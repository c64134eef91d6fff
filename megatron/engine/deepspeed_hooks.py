"""Around the instructions of the pipeline's schedule: the only place that reaches into how the engine runs a step.

DeepSpeed looks each instruction up in a table of its class. An engine gets its own copy of the table here, with
something done around some of them; the class stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megatron.engine.optimizer import UNDECAYED

Instruction = type[schedule.PipeInstruction]

# What an instruction is for, in the words of the log.
PHASES: dict[Instruction, str] = {
    schedule.LoadMicroBatch: "data",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.SendActivation: "pipeline",
    schedule.RecvActivation: "pipeline",
    schedule.SendGrad: "pipeline",
    schedule.RecvGrad: "pipeline",
    schedule.ReduceTiedGrads: "reduce",
    schedule.ReduceGrads: "reduce",
    schedule.OptimizerStep: "optimizer",
}


def run_inside(engine: PipelineEngine, around: Callable[[str], AbstractContextManager[Any]]) -> None:
    """Run every instruction of `engine` inside `around(phase)`."""
    _check_table(engine)
    for instruction, phase in PHASES.items():
        _wrap(engine, instruction, partial(around, phase))


def spread_what_is_not_finite(engine: PipelineEngine) -> None:
    """Have every rank's optimizer see a gradient that is not finite, wherever it is.

    The norm by which DeepSpeed decides to skip a step counts a parameter that tensor-parallel ranks replicate on the
    first of them alone; a NaN in another's copy (a faulty GPU: the others' copies are right) would be applied there.
    So before the optimizer a rank whose replicated gradients are not finite spoils its gradients of matrices, which
    the norm counts. No rank asks another one, and nothing waits for the GPU.
    """
    _check_table(engine)
    optimizer = engine.optimizer
    gradients_of = _gradients(optimizer)  # raises for an optimizer that keeps them elsewhere
    names = [group["name"] for group in optimizer.param_groups]

    @contextmanager
    def spread() -> Iterator[None]:
        vectors = [g for i, name in enumerate(names) if name == UNDECAYED for g in gradients_of(i)]
        matrices = [g for i, name in enumerate(names) if name != UNDECAYED for g in gradients_of(i)]
        if vectors and matrices:
            with torch.no_grad():
                finite = torch.stack([vector.isfinite().all() for vector in vectors]).all()
                factor = torch.where(finite, 1.0, torch.nan)
                for matrix in matrices:
                    matrix.view(-1)[:1].mul_(factor)
        yield

    _wrap(engine, schedule.OptimizerStep, spread)


def _gradients(optimizer: Any) -> Callable[[int], list[Tensor]]:
    """This rank's reduced gradients of a parameter group, as the optimizer will use them."""
    if hasattr(optimizer, "averaged_gradients"):  # DeepSpeedZeroOptimizer
        return lambda group: list(optimizer.averaged_gradients[group] or [])
    if hasattr(optimizer, "fp32_groups_gradients"):  # BF16_Optimizer
        return lambda group: list(optimizer.fp32_groups_gradients[group])
    raise RuntimeError(f"{type(optimizer).__name__} keeps its gradients where this project does not know")


def _wrap(engine: PipelineEngine, instruction: Instruction, around: Callable[[], AbstractContextManager[Any]]) -> None:
    original = engine._INSTRUCTION_MAP[instruction]

    def execute(self: PipelineEngine, **arguments: Any) -> None:
        with around():
            original(self, **arguments)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, instruction: execute}


def _check_table(engine: PipelineEngine) -> None:
    if set(engine._INSTRUCTION_MAP) != set(PHASES):
        unknown = {kind.__name__ for kind in set(engine._INSTRUCTION_MAP) ^ set(PHASES)}
        raise RuntimeError(f"the pipeline engine has other instructions than this project knows: {', '.join(unknown)}")
