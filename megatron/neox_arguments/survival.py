"""What keeps a long run alive and honest: watchdogs, skipped steps and samples, checks of replicas, profiles."""

from __future__ import annotations

from megatron.neox_arguments.fields import Keys, key


class SurvivalKeys(Keys):
    max_skipped_steps: int = key(
        10, "Optimizer steps skipped for a loss or gradient that is not finite, before the run stops.", ours=True, ge=0
    )
    max_skipped_steps_in_a_row: int = key(
        3, "The same, in a row: broken weights or data fail every step, bad luck does not.", ours=True, ge=0
    )
    skip_sample_ranges: list[list[int]] = key(
        [],
        "Samples to leave out, as [first, end) in the order of the run, after a loss spike: [[1000, 1512]]. What lies "
        "behind the run's position changes nothing.",
        ours=True,
    )
