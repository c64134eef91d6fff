"""megatron-core's settings for a configuration: schedules and gradient buckets; and their description in the log."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.engine.optimizer import adapter_and_slice_lines
from megatron.model.pipeline import PARAMETER_DTYPES
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place


def transformer_config(args: NeoXArgs, place: Place, virtual: int) -> TransformerConfig:
    """Settings of the model and the layout that the schedules read."""
    dtype = PARAMETER_DTYPES[args.precision]
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        tensor_model_parallel_size=place.tp,
        pipeline_model_parallel_size=place.pp,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=args.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=args.precision == "bfloat16",
        use_cpu_initialization=True,
        perform_initialization=False,
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        batch_p2p_sync=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
    )


def bucket_config(args: NeoXArgs) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        align_param_gather=True,  # the engine starts all gathers itself, after the optimizer
    )


def description(args: NeoXArgs, place: Place, virtual: int, layers: Callable[[int, int], range]) -> list[str]:
    """Lines for the start of the log; `layers(stage, virtual)` returns the layer numbers of a virtual stage."""
    kinds = (("reduction", args.overlap_grad_reduce), ("gather", args.overlap_param_gather))
    overlapped = " and ".join(name for name, is_so in kinds if is_so) or "nothing"
    runs = [[layers(stage, number) for number in range(virtual)] for stage in range(place.pp)]
    stages = (
        f"{stage}: layers {' and '.join(f'{run.start}-{run.stop - 1}' for run in of_stage)}"
        for stage, of_stage in enumerate(runs)
    )
    lines = [
        f"engine: megatron-core's distributed optimizer over AdamW, weights {args.precision}, gradients accumulated "
        f"and reduced in fp32, clipping at {args.gradient_clipping:g}; overlapped: {overlapped}",
        f"batch: {args.train_batch_size} = micro-batch {args.train_micro_batch_size_per_gpu} x accumulation "
        f"{args.gradient_accumulation_steps} x data parallel {place.dp}",
        f"stages: {', '.join(stages)}",
    ]
    return lines + adapter_and_slice_lines(args)
