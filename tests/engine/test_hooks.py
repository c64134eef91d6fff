"""Hooks around the engine's instructions, and the rejection of unknown versions of the engine."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from megatron.supervision.step_timers import TIMED, WAITING

pytestmark = pytest.mark.unit


def test_every_instruction_of_the_pinned_engine_has_a_phase() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from megatron.engine.deepspeed_hooks import PHASE_OF

    assert set(PHASE_OF) == set(PipelineEngine._INSTRUCTION_MAP)
    assert set(PHASE_OF.values()) | {"step"} == set(TIMED)
    assert set(WAITING) < set(TIMED)


def test_an_engine_with_other_instructions_is_refused() -> None:
    from deepspeed.runtime.pipe import schedule

    from megatron.engine.deepspeed_hooks import PHASE_OF, run_instructions_inside

    table = {kind: None for kind in PHASE_OF if kind is not schedule.SendGrad}
    with pytest.raises(RuntimeError, match="instructions differ from those expected: SendGrad"):
        run_instructions_inside(SimpleNamespace(_INSTRUCTION_MAP=table), lambda phase: contextlib.nullcontext())


def test_an_optimizer_with_gradients_elsewhere_is_refused() -> None:
    from megatron.engine.deepspeed import reduced_gradients

    with pytest.raises(RuntimeError, match="SimpleNamespace keeps its gradients in a place unknown to this project"):
        reduced_gradients(SimpleNamespace(param_groups=[]), 0)


def test_the_class_of_the_engine_stays_as_it_is() -> None:
    """Only this instance's instructions are wrapped; they get their arguments, and the context ends if they raise."""
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from megatron.engine.deepspeed_hooks import run_instructions_inside

    seen: list[str] = []

    @contextlib.contextmanager
    def around(phase: str):  # type: ignore[no-untyped-def]
        seen.append(phase)
        yield
        seen.append(f"end of {phase}")

    def load(engine: object, buffer_id: int) -> None:
        seen.append(f"buffer {buffer_id}")

    before = dict(PipelineEngine._INSTRUCTION_MAP)
    engine = SimpleNamespace(_INSTRUCTION_MAP={**before, schedule.LoadMicroBatch: load})
    run_instructions_inside(engine, around)
    engine._INSTRUCTION_MAP[schedule.LoadMicroBatch](engine, buffer_id=3)
    assert seen == ["data", "buffer 3", "end of data"]
    assert before == PipelineEngine._INSTRUCTION_MAP
