"""Keys for the reliability of long runs, and their rules: watchdog, skipped steps, replicas, profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.neox_arguments.keys.fields import Keys, derived, key
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class SurvivalKeys(Keys):
    step_timeout_minutes: float = derived(
        "the smaller of 10 and 0.9 x distributed_timeout_minutes",
        "Minutes without progress, in a training step or an evaluation between steps, after which the run ends and "
        "names the ranks that did not arrive. Everything else may take 0.9 x distributed_timeout_minutes.",
        ours=True,
        gt=0,
    )
    heartbeat_timeout_seconds: float = key(
        120.0,
        "Seconds without a heartbeat after which the run ends and names the silent rank; 0 turns the watchdog off.",
        ours=True,
        ge=0,
    )
    max_skipped_steps: int = key(
        10,
        "Number of optimizer steps that may be skipped for a non-finite loss or gradient; one more stops the run.",
        ours=True,
        ge=0,
    )
    max_skipped_steps_in_a_row: int = key(
        3,
        "Number of consecutive steps that may be skipped; one more stops the run. Broken weights or data fail every "
        "step, an unlucky batch only one.",
        ours=True,
        ge=0,
    )
    skip_sample_ranges: list[list[int]] = key(
        [],
        "Samples to leave out, for instance after a loss spike: ranges from first to end (exclusive) in the order of "
        "the run, as in [[1000, 1512]]. Ranges already consumed have no effect.",
        ours=True,
    )
    slow_step_factor: float = key(
        1.25,
        "Report a step that takes this many times the running median, with its slowest rank; 0 is off.",
        ours=True,
        ge=0,
    )
    step_time_drift: float = key(
        1.1,
        "Report a gradual rise of step times to this many times their best median, with the phase that grew; 0 is off.",
        ours=True,
        ge=0,
    )
    replica_check_interval: int = key(
        100,
        "Iterations between comparisons of replicated parameters by checksum (all over data-parallel ranks, norms over "
        "tensor-parallel ranks), which also precede every save; 0 is off.",
        ours=True,
        ge=0,
    )
    profile: bool = key(False, "Write torch profiler traces of some steps to log_dir, else to tensorboard_dir.")
    profile_step_start: int = key(10, "First iteration of the trace.", ge=1)
    profile_step_stop: int = key(12, "First iteration after the trace.", ge=2)
    profile_ranks: list[int] = key([0], "Ranks that write a trace.", ours=True, min_length=1)


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("step_timeout_minutes",))
def step_timeout(args: AllKeys, world_size: int | None) -> Derived:
    if args.step_timeout_minutes is not None:
        return Derived({})
    return Derived({"step_timeout_minutes": min(10.0, 0.9 * args.distributed_timeout_minutes)})


# --- rules


@registry.rule("train", "eval")
def skipped_ranges_are_ranges(args: SurvivalKeys) -> str | None:
    wrong = [pair for pair in args.skip_sample_ranges if len(pair) != 2 or not 0 <= pair[0] < pair[1]]
    if not wrong:
        return None
    return f"skip_sample_ranges: {wrong[0]} is not a range of samples; write [first, end] with 0 <= first < end"


@registry.rule("train", "eval", "generate", "mcq", "embed")
def a_step_ends_before_its_collectives(args: AllKeys) -> str | None:
    if args.step_timeout_minutes < args.distributed_timeout_minutes:
        return None
    return (
        f"step_timeout_minutes {args.step_timeout_minutes:g} is not below distributed_timeout_minutes "
        f"{args.distributed_timeout_minutes}: a collective would time out before the watchdog can name the ranks that "
        f"did not arrive; lower it, or raise distributed_timeout_minutes"
    )


@registry.rule("train")
def a_profile_has_steps_ranks_and_a_folder(args: AllKeys) -> str | None:
    if not args.profile:
        return None
    if not (args.log_dir or args.tensorboard_dir):
        return "profile needs log_dir or tensorboard_dir, where the traces are written"
    if args.profile_step_start >= args.profile_step_stop:
        return (
            f"profile_step_start {args.profile_step_start} is not below profile_step_stop {args.profile_step_stop}, "
            f"the first iteration after the trace"
        )
    outside = [rank for rank in args.profile_ranks if not 0 <= rank < args.global_num_gpus]
    return f"profile_ranks {outside} do not exist; ranks are 0 to {args.global_num_gpus - 1}" if outside else None
