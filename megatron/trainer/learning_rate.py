"""Learning rate as a pure function of the iteration: nothing to save, nothing to restore wrongly."""

from __future__ import annotations

import math

from megatron.neox_arguments import NeoXArgs


def learning_rate(args: NeoXArgs, iteration: int) -> float:
    """Learning rate of the step that follows `iteration` finished ones.

    Warm-up is linear over `warmup * lr_decay_iters`, then follows the decay style. After the decay's end the rate
    stays at its last value, where GPT-NeoX's cosine climbs again. `lr_overrides` multiply the rate from an iteration
    on, as an operator does by hand after a loss spike; several multiply together.
    """
    rate = _scheduled(args, iteration)
    for override in args.lr_overrides:
        if iteration >= override.at:
            rate *= override.scale
    return rate


def _scheduled(args: NeoXArgs, iteration: int) -> float:
    peak, floor = args.lr, args.min_lr
    decay_iters = args.lr_decay_iters or args.train_iters
    warmup_iters = args.warmup * decay_iters
    if iteration <= warmup_iters and warmup_iters > 0:
        return peak * max(1, iteration) / warmup_iters
    progress = min(1.0, (iteration - warmup_iters) / max(1.0, decay_iters - warmup_iters))
    if args.lr_decay_style == "constant":
        return peak
    if args.lr_decay_style == "linear":
        return max(floor, peak * (1.0 - progress))
    if args.lr_decay_style == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown lr_decay_style {args.lr_decay_style!r}")
