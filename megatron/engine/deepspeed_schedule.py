"""The order of instructions in a training step of DeepSpeed's pipeline engine, without an engine."""

from __future__ import annotations

from deepspeed.runtime.pipe.schedule import TrainSchedule


def stage_instructions(num_micro_batches: int, stages: int, stage: int) -> list[str]:
    """Names of the instructions that one stage executes in a step, in order: LoadMicroBatch, ForwardPass, ..."""
    schedule = TrainSchedule(micro_batches=num_micro_batches, stages=stages, stage_id=stage)
    return [type(instruction).__name__ for step in schedule for instruction in step]
