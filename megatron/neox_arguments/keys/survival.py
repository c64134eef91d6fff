"""What keeps a long run alive and honest: watchdogs, skipped steps and samples, checks of replicas, profiles."""

from __future__ import annotations

from megatron.neox_arguments.keys.fields import Keys, derived, key


class SurvivalKeys(Keys):
    step_timeout_minutes: float = derived(
        "the smaller of 10 and 0.9 x distributed_timeout_minutes",
        "A rank that makes no progress in a training step, or an evaluation between steps, for this long ends the run, "
        "and the ranks that did not arrive are named. All else has 0.9 x distributed_timeout_minutes.",
        ours=True,
        gt=0,
    )
    heartbeat_timeout_seconds: float = key(
        120.0,
        "A rank whose process gives no sign of life for this long ends the run and is named; 0 turns the watchdog off.",
        ours=True,
        ge=0,
    )
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
    slow_step_factor: float = key(
        1.25,
        "A step that takes this many times the running median is reported with its slowest rank; 0 is off.",
        ours=True,
        ge=0,
    )
    step_time_drift: float = key(
        1.1,
        "Step times that creep up to this many times their best median are reported with the phase; 0 is off.",
        ours=True,
        ge=0,
    )
    replica_check_interval: int = key(
        100,
        "Iterations between checksums of replicated parameters (all over data-parallel ranks, norms over "
        "tensor-parallel ranks), also before each save; 0 is off.",
        ours=True,
        ge=0,
    )
    profile: bool = key(False, "Write torch profiler traces of some steps to log_dir.")
    profile_step_start: int = key(10, "First iteration in the trace.", ge=1)
    profile_step_stop: int = key(12, "First iteration that is not in the trace any more.", ge=2)
    profile_ranks: list[int] = key([0], "Ranks that write a trace.", ours=True, min_length=1)
