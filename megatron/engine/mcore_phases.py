"""The phases of a step under megatron-core's schedules, derived from the timers that they start and stop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from megatron.engine.protocol import Around

_PIPELINE = (
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "forward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
)
PHASE_OF = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "reduce",
    "non-tensor-parallel-grads-all-reduce": "reduce",
    "embedding-grads-all-reduce": "reduce",
    **dict.fromkeys(_PIPELINE, "pipeline"),
}


class PhaseTimers:
    """Replaces megatron-core's timers: each timer that belongs to a phase runs inside `around(phase)`."""

    def __init__(self, around: Around) -> None:
        self._timers = {name: _PhaseTimer(around, phase) for name, phase in PHASE_OF.items()}
        self._other = _NoTimer()

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        return self._timers.get(name, self._other)


class _PhaseTimer:
    def __init__(self, around: Around, phase: str) -> None:
        self._around, self._phase = around, phase
        self._inside: AbstractContextManager[Any] | None = None

    def start(self, barrier: bool = False) -> None:
        self._inside = self._around(self._phase)
        self._inside.__enter__()

    def stop(self, barrier: bool = False) -> None:
        if self._inside is not None:
            self._inside.__exit__(None, None, None)
            self._inside = None


class _NoTimer:
    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass
