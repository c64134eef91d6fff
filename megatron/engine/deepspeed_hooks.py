"""Hooks around the instructions of DeepSpeed's pipeline schedule: the only place that changes how it runs a step.

DeepSpeed looks up each instruction in a table that belongs to the engine's class. Here an engine gets its own copy of
the table, in which some instructions are wrapped; the class is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor

from megatron.engine.protocol import Around

Instruction = type[schedule.PipeInstruction]
Execute = Callable[..., None]

# The phase of a step to which each instruction belongs.
PHASE_OF: dict[Instruction, str] = {
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


def run_instructions_inside(engine: PipelineEngine, around: Around) -> None:
    """Run every instruction of `engine` inside `around(phase)`."""

    def execute(phase: str, original: Execute, self: PipelineEngine, **arguments: Any) -> None:
        with around(phase):
            original(self, **arguments)

    for instruction, phase in PHASE_OF.items():
        _replace(engine, instruction, partial(execute, phase))


def run_optimizer_after(engine: PipelineEngine, action: Callable[[], None]) -> None:
    """Call `action` before each optimizer step, once this rank's gradients have been reduced."""

    def execute(original: Execute, self: PipelineEngine, **arguments: Any) -> None:
        action()
        original(self, **arguments)

    _replace(engine, schedule.OptimizerStep, execute)


def free_logits_after_backward(engine: PipelineEngine) -> None:
    """Have the last stage free a micro-batch's logits, their graph and its input after the backward pass.

    DeepSpeed does this only on the other stages; the last would hold the logits of two micro-batches while it computes
    those of a third.
    """

    def execute(original: Execute, self: PipelineEngine, buffer_id: int) -> None:
        original(self, buffer_id=buffer_id)
        self.pipe_buffers["outputs"][buffer_id] = None
        self.loss = self.loss.detach()

    if engine.is_last_stage():
        _replace(engine, schedule.BackwardPass, execute)


def take_norm_of_all_groups(optimizer: Any, names: Sequence[str]) -> None:
    """Have every rank reduce the norms of all parameter groups of the model, in the order of `names`.

    ZeRO reduces over all stages once for each group that the rank has. If a stage lacks a group that another stage has
    (such as the replicated matrix at the end of a pipeline), the ranks would wait forever.
    """
    if not hasattr(optimizer, "scaled_global_norm"):  # BF16_Optimizer reduces all groups at once
        return
    numbers = {group["name"]: number for number, group in enumerate(optimizer.param_groups)}

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        norms = []
        for name in names:
            number = numbers.get(name)
            held = number is not None
            gradients = optimizer.averaged_gradients[number] if held else []
            norms.append(
                optimizer.get_grad_norm_direct(gradients, optimizer.params_in_partition[number] if held else [])
            )
        return combine_grad_norm_groups(norms, norm_type=norm_type)

    optimizer.scaled_global_norm = scaled_global_norm


def _replace(engine: PipelineEngine, instruction: Instruction, execute: Execute) -> None:
    """Have `engine` execute an instruction by `execute(original, engine, **arguments)`."""
    _check_table(engine)
    original = engine._INSTRUCTION_MAP[instruction]
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, instruction: partial(execute, original)}


def _check_table(engine: PipelineEngine) -> None:
    if set(engine._INSTRUCTION_MAP) != set(PHASE_OF):
        unknown = {kind.__name__ for kind in set(engine._INSTRUCTION_MAP) ^ set(PHASE_OF)}
        raise RuntimeError(f"the pipeline engine's instructions differ from those expected: {', '.join(unknown)}")
