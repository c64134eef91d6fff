"""fp16 loss scaling on DeepSpeed's ZeRO optimizer: when the scale changes, why a step was skipped, what is saved.

DeepSpeed raises the scale before it divides the gradients by it, so that a step that doubles the scale halves the
gradients. Here the scale changes after the step. On an overflow at the minimum scale DeepSpeed ends the run with an
exception; here it counts as a non-finite step, and the configuration limits their number.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megatron.engine.protocol import LossScaleState


class LossScale:
    """The scale of one engine's optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._overflow: bool | None = None
        optimizer._update_scale = self._note  # called in optimizer.step() before the gradients are divided
        self.overflows = 0

    def _note(self, overflow: bool) -> None:
        self._overflow = bool(overflow)

    @property
    def _scaler(self) -> Any:
        return self._optimizer.loss_scaler  # replaced when the optimizer's state is loaded

    @property
    def scale(self) -> float:
        return float(self._scaler.cur_scale)

    def after_step(self, loss_is_finite: bool) -> bool:
        """Update the scale; True if the last step was skipped because of an overflow that a lower scale may avoid."""
        overflow, self._overflow = self._overflow, None
        if overflow is None:
            raise RuntimeError("DeepSpeed's optimizer made a step without moving its loss scale")
        scaler = self._scaler
        can_fall = isinstance(scaler, DynamicLossScaler) and scaler.cur_scale > scaler.min_scale
        if isinstance(scaler, DynamicLossScaler):
            scaler.raise_error_at_min_scale = False
        scaler.update_scale(overflow)
        counted = overflow and can_fall and loss_is_finite
        self.overflows += counted
        return counted

    @property
    def state(self) -> LossScaleState:
        scaler = self._scaler
        if not isinstance(scaler, DynamicLossScaler):
            return LossScaleState(self.scale)
        return LossScaleState(self.scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis)

    @state.setter
    def state(self, state: LossScaleState) -> None:
        scaler = self._scaler
        if isinstance(scaler, DynamicLossScaler):  # a static scale comes from the configuration
            scaler.cur_scale, scaler.cur_iter = state.scale, state.steps
            scaler.last_overflow_iter, scaler.cur_hysteresis = state.last_overflow, state.hysteresis
