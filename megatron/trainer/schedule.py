"""Length and learning rate of a run: pure functions of the iteration, with nothing to save and to restore wrongly."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from megatron.common.errors import ConfigError
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.keys.optimization import decay_iters

logger = logging.getLogger(__name__)


def check_length(iteration: int, train_iters: int, args: NeoXArgs) -> None:
    """ConfigError if the run is shorter than what it continues; a line if it is done already. Every rank calls it."""
    if iteration > train_iters:
        raise ConfigError(
            f"the checkpoint stands at iteration {iteration}, train_iters is {train_iters}: there is nothing to train. "
            f"Raise it with --train_iters N, or begin anew from the weights in another folder with --finetune true "
            f"--save NEW"
        )
    if iteration == train_iters and iteration:
        logger.info(f"the checkpoint stands at iteration {iteration}, which is train_iters: the run is done")


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps a run takes, and the learning rate of each.

    `train_iters` is the configuration's, or what its `train_epochs` come to with the data at hand.
    """

    args: NeoXArgs
    train_iters: int

    @property
    def lr_decay_iters(self) -> int:
        """Iteration at which the learning rate stops falling."""
        return self.args.lr_decay_iters or decay_iters(self.train_iters, self.args.lr_decay_fraction)

    def learning_rate(self, iteration: int) -> float:
        """Learning rate of the step that follows `iteration` finished ones.

        Warm-up is linear over `warmup * lr_decay_iters`, then follows the decay style. After the decay's end the rate
        stays at its last value, where GPT-NeoX's cosine climbs again. `lr_overrides` multiply the rate from an
        iteration on, as an operator does by hand after a loss spike; several multiply together.
        """
        rate = self._scheduled(iteration)
        for override in self.args.lr_overrides:
            if iteration >= override.at:
                rate *= override.scale
        return rate

    def _scheduled(self, iteration: int) -> float:
        args = self.args
        peak, floor = args.lr, args.min_lr
        warmup_iters = args.warmup * self.lr_decay_iters
        if iteration <= warmup_iters and warmup_iters > 0:
            return peak * min(1.0, max(1, iteration) / warmup_iters)  # a share of less than one step is no warm-up
        progress = min(1.0, (iteration - warmup_iters) / max(1.0, self.lr_decay_iters - warmup_iters))
        if args.lr_decay_style == "exponential":
            return max(floor, peak * math.exp(-0.693 * progress))  # GPT-NeoX's constant: half at the end
        if args.lr_decay_style == "constant":
            return peak
        if args.lr_decay_style == "linear":
            return max(floor, peak * (1.0 - progress))
        if args.lr_decay_style == "cosine":
            return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
        raise ValueError(f"unknown lr_decay_style {args.lr_decay_style!r}")
