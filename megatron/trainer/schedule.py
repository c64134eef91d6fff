"""Length and learning rate of a run: pure functions of the iteration, without state that could be restored
incorrectly."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from megatron.common.errors import ConfigError
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.keys.optimization import (
    cooldown_length,
    decay_iters,
    schedule_problem,
    warmup_length,
)

logger = logging.getLogger(__name__)


def check_length(iteration: int, train_iters: int, args: NeoXArgs) -> None:
    """ConfigError if the run is shorter than the one it continues; a log line if it is already finished. Called by
    every rank."""
    if iteration > train_iters:
        raise ConfigError(
            f"the checkpoint stands at iteration {iteration}, train_iters is {train_iters}: there is nothing to train. "
            f"Raise it with --train_iters N, or begin anew from the weights in another folder with --finetune true "
            f"--save NEW"
        )
    if iteration == train_iters and iteration:
        logger.info(f"the checkpoint stands at iteration {iteration}, which is train_iters: the run is finished")


def check_schedule(schedule: Schedule, iteration: int) -> None:
    """ConfigError if warm-up and cooldown do not fit, or begin after the first step. Called by every rank.

    The length of a run in epochs is known only once its data are open, so the configuration cannot check this.
    """
    problem = schedule_problem(schedule.args, schedule.lr_decay_iters)
    begin = schedule.args.lr_restart_iter
    if problem is None and iteration < begin:
        problem = (
            f"lr_restart_iter {begin} is where the schedule of a continued run restarts, but this one begins at "
            f"iteration {iteration}; continue a checkpoint of iteration {begin} or later (without finetune), or leave "
            f"it out"
        )
    if problem is not None:
        raise ConfigError(problem)


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps a run takes, and the learning rate of each.

    `train_iters` is the configuration's, or follows from its `train_epochs` and the size of the data.
    """

    args: NeoXArgs
    train_iters: int

    @property
    def lr_decay_iters(self) -> int:
        """Iteration at which the learning rate stops falling."""
        return self.args.lr_decay_iters or decay_iters(self.train_iters, self.args.lr_decay_fraction)

    def learning_rate(self, iteration: int) -> float:
        """Learning rate of the step that follows `iteration` finished ones.

        Warm-up is linear over `lr_warmup_iters` or `warmup * lr_decay_iters`, then follows the decay style. After the
        decay's end the rate stays at its last value, whereas GPT-NeoX's cosine rises again. With `lr_restart_iter` the
        schedule counts from there and rises from `min_lr`. `lr_overrides` multiply the rate from an iteration on, as an
        operator does by hand after a loss spike; several multiply together.
        """
        rate = self._scheduled(iteration)
        for override in self.args.lr_overrides:
            if iteration >= override.at:
                rate *= override.scale
        return rate

    def _scheduled(self, iteration: int) -> float:
        args, end = self.args, self.lr_decay_iters
        peak, floor = args.lr, args.min_lr
        warmup_iters = warmup_length(args, end)
        since = iteration - args.lr_restart_iter
        if since <= warmup_iters and warmup_iters > 0:
            share = min(1.0, max(1, since) / warmup_iters)  # a warm-up of less than one step is none
            return floor + (peak - floor) * share if args.lr_restart_iter else peak * share
        begin = args.lr_restart_iter + warmup_iters
        if args.lr_decay_style == "wsd":
            # Counted from the run's end, so that until the cooldown runs of different lengths have the same rates.
            cooldown = cooldown_length(args, end)
            past = iteration - (end - cooldown)
            return peak if past <= 0 or not cooldown else floor + (peak - floor) * self._cooled(past / cooldown)
        progress = min(1.0, (iteration - begin) / max(1.0, end - begin))
        if args.lr_decay_style == "exponential":
            return max(floor, peak * math.exp(-0.693 * progress))  # GPT-NeoX's constant: half at the end
        if args.lr_decay_style == "constant":
            return peak
        if args.lr_decay_style == "linear":
            return max(floor, peak * (1.0 - progress))
        if args.lr_decay_style == "cosine":
            return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
        raise ValueError(f"unknown lr_decay_style {args.lr_decay_style!r}")

    def _cooled(self, x: float) -> float:
        """The remaining distance from peak to floor, from 1 to 0, after a fraction `x` of the cooldown."""
        x = min(1.0, x)
        style = self.args.lr_wsd_decay_style
        if style == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * x))
        if style == "exponential":
            return 2.0 * 0.5**x - 1.0
        return 1.0 - (math.sqrt(x) if style == "minus_sqrt" else x)
