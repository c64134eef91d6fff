"""The dictionary for `deepspeed.initialize(config=...)`.

Everything that matters is passed, even where it equals DeepSpeed's default: GPT-NeoX leaves out values equal to its own
defaults, and so trained for years without gradient clipping (gpt-neox #1432).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.neox_arguments.keys.precision import Fp16

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys


def deepspeed_dictionary(args: AllKeys, *, with_extra: bool = True) -> dict[str, Any]:
    """Batch sizes, clipping, precision and ZeRO of a resolved configuration.

    bf16 comes with `grad_accum_dtype: fp32`, which selects DeepSpeed's BF16_Optimizer; without it gradients would be
    accumulated in bf16. `communication_data_type` does the same for their reduction over data-parallel ranks, which
    DeepSpeed would otherwise round to bf16. fp16 is treated likewise.
    """
    config: dict[str, Any] = {
        "train_batch_size": args.train_batch_size,
        "train_micro_batch_size_per_gpu": args.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.gradient_clipping,
        "zero_optimization": args.zero_optimization.model_dump(exclude={"cpu_offload"}),
        "wall_clock_breakdown": args.wall_clock_breakdown,
    }
    if args.wall_clock_breakdown:  # DeepSpeed prints a timer report at this interval, and fails if it is not set
        config["steps_per_print"] = args.log_interval
    if args.precision == "bfloat16":
        config["bf16"] = (args.bf16.model_dump() if args.bf16 else {}) | {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    config |= pipeline_messages(args)
    if args.precision == "fp16":
        config["fp16"] = (args.fp16 or Fp16()).model_dump() | {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    if with_extra:
        config |= args.deepspeed_extra_args
    return config


def pipeline_messages(args: AllKeys) -> dict[str, Any]:
    """How stages pass tensors if not by DeepSpeed's default of partitioning them over tensor-parallel ranks.

    Under sequence parallelism each rank's tensor is a slice already and goes as it is.
    """
    return {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}} if args.sequence_parallel else {}
