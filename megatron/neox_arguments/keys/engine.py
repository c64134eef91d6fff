"""Keys that select the engine and what it overlaps, and their rules.

Evaluation and generation read the same files at other layouts, so the rules about virtual stages and overlapping apply
only to training.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from megatron.neox_arguments.keys.fields import Keys, derived, key
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class EngineKeys(Keys):
    engine: Literal["deepspeed", "megatron"] = key(
        "deepspeed",
        "What runs the pipeline, gradient reduction and optimizer: DeepSpeed, or megatron-core's schedules and "
        "distributed optimizer, with the same layers, losses and checkpoints (docs/engines.md).",
        ours=True,
    )
    virtual_pipe_parallel_size: int = key(
        1,
        "With engine: megatron, the number of virtual stages (runs of layers) per pipeline rank; more fill the "
        "pipeline faster but send more messages. Above 1, gradient_accumulation_steps must be a multiple of "
        "pipe_parallel_size.",
        ours=True,
        gt=0,
    )
    overlap_grad_reduce: bool = derived(
        "true with engine: megatron",
        "Reduce gradients bucket by bucket during the backward pass.",
        ours=True,
    )
    overlap_param_gather: bool = derived(
        "the value of overlap_grad_reduce",
        "Gather updated weights during the next step's first forward pass.",
        ours=True,
    )


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("overlap_grad_reduce", "overlap_param_gather"))
def what_is_overlapped(args: EngineKeys, world_size: int | None) -> Derived:
    reduce, gather = args.overlap_grad_reduce, args.overlap_param_gather
    if reduce is None:
        reduce = args.engine == "megatron"
    if gather is None:
        gather = reduce
    return Derived({"overlap_grad_reduce": reduce, "overlap_param_gather": gather})


# --- rules


@registry.rule("train")
def virtual_stages_are_of_engine_megatron(args: EngineKeys) -> str | None:
    if args.virtual_pipe_parallel_size == 1 or args.engine == "megatron":
        return None
    return (
        f"virtual_pipe_parallel_size {args.virtual_pipe_parallel_size} is not available with engine: deepspeed, whose "
        f"ranks hold one run of layers each; write engine: megatron, or leave virtual_pipe_parallel_size out"
    )


@registry.rule("train")
def virtual_stages_are_of_a_pipeline(args: AllKeys) -> str | None:
    if args.virtual_pipe_parallel_size == 1 or args.pipe_parallel_size > 1:
        return None
    return (
        f"virtual_pipe_parallel_size {args.virtual_pipe_parallel_size} with pipe_parallel_size 1: there is no pipeline "
        f"to fill; leave virtual_pipe_parallel_size out, or use several pipeline stages"
    )


@registry.rule("train")
def every_virtual_stage_has_a_layer(args: AllKeys) -> str | None:
    pipe, virtual = args.pipe_parallel_size, args.virtual_pipe_parallel_size
    if virtual == 1 or pipe > args.num_layers or pipe * virtual <= args.num_layers:
        return None
    return (
        f"pipe_parallel_size {pipe} x virtual_pipe_parallel_size {virtual} is more than num_layers {args.num_layers}: "
        f"a virtual stage would have no layer; use at most virtual_pipe_parallel_size: {args.num_layers // pipe}"
    )


@registry.rule("train")
def micro_batches_fill_virtual_stages(args: AllKeys) -> str | None:
    pipe, steps = args.pipe_parallel_size, args.gradient_accumulation_steps
    if args.virtual_pipe_parallel_size == 1 or steps % pipe == 0:
        return None
    return (
        f"gradient_accumulation_steps {steps} is not a multiple of pipe_parallel_size {pipe}: with "
        f"virtual_pipe_parallel_size {args.virtual_pipe_parallel_size}, micro-batches go through the pipeline in "
        f"groups of {pipe}; use {-(-steps // pipe) * pipe}"
    )


@registry.rule("train")
def engine_megatron_deals_decoder_layers(args: AllKeys) -> str | None:
    """All messages between stages then have the same shape, [s, b, h]."""
    method = args.pipe_partition_method
    if args.engine != "megatron" or args.pipe_parallel_size == 1 or _balances_decoder_layers(method):
        return None
    return (
        f"pipe_partition_method {method} is not available with engine: megatron, which distributes decoder layers "
        f"evenly; write pipe_partition_method: type:transformer|mlp, or engine: deepspeed"
    )


def _balances_decoder_layers(method: str) -> bool:
    """Whether a `type:REGEX` counts decoder layers and nothing else."""
    kind, _, pattern = method.partition(":")
    classes = ("TransformerLayer", "Embedding", "FinalNorm", "Head")
    counted = [name for name in classes if kind == "type" and re.search(pattern, name, re.IGNORECASE)]
    return counted == ["TransformerLayer"]


@registry.rule("train")
def overlapping_is_of_engine_megatron(args: EngineKeys) -> str | None:
    given = [name for name in ("overlap_grad_reduce", "overlap_param_gather") if getattr(args, name)]
    if args.engine == "megatron" or not given:
        return None
    return (
        f"{' and '.join(given)}: not available with engine: deepspeed, which reduces and gathers when the pipeline is "
        f"empty; write engine: megatron, or leave {' and '.join(given)} out"
    )


@registry.rule("train")
def gathering_overlaps_with_reducing(args: EngineKeys) -> str | None:
    if args.engine != "megatron" or args.overlap_grad_reduce or not args.overlap_param_gather:
        return None
    return (
        "overlap_param_gather: true with overlap_grad_reduce: false: megatron-core gathers with the buckets that it "
        "reduces with; write overlap_grad_reduce: true, or leave overlap_param_gather out"
    )


@registry.rule("train")
def engine_megatron_has_no_loss_scale(args: AllKeys) -> str | None:
    if args.engine != "megatron" or args.precision != "fp16":
        return None
    return (
        "precision fp16 is not available with engine: megatron: loss scaling is DeepSpeed's; write precision: bfloat16 "
        "(and no fp16 mapping), or engine: deepspeed"
    )


@registry.rule("train")
def options_of_deepspeed_reach_it(args: AllKeys) -> str | None:
    if args.engine != "megatron" or not args.deepspeed_extra_args:
        return None
    return (
        f"deepspeed_extra_args: {', '.join(sorted(args.deepspeed_extra_args))} has no effect with engine: megatron, "
        f"which does not use DeepSpeed; leave deepspeed_extra_args out, or write engine: deepspeed"
    )


@registry.warning("train")
def deepspeed_keys_have_no_effect(args: AllKeys) -> str | None:
    """`zero_optimization` is in every GPT-NeoX file: its stage 1 is what megatron-core's optimizer does."""
    if args.engine != "megatron":
        return None
    given = [name for name in ("zero_optimization", "wall_clock_breakdown") if args.merged.get(name)]
    if not given:
        return None
    return (
        f"without effect with engine: megatron: {', '.join(given)} (optimizer states are sharded over data-parallel "
        f"ranks as with ZeRO 1, in buckets of megatron-core's sizes; the step timers are always on)"
    )
