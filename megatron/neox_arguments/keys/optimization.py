"""Keys of the optimisation: optimizer, schedule, batch, precision, ZeRO and activation checkpointing."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron.neox_arguments.keys.fields import Keys, derived, key, required


class OptimizerParams(Keys):
    lr: float = required("Peak learning rate.", ge=0)
    betas: list[float] = key([0.9, 0.999], "Decay of the two moments. Llama: [0.9, 0.95].", min_length=2, max_length=2)
    eps: float = key(1e-8, "Added to the root of the second moment.", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _decay_is_elsewhere(cls, value: Any) -> Any:
        if isinstance(value, dict) and "weight_decay" in value:
            raise ValueError("weight_decay stands at top level, not inside optimizer.params; move it")
        return value


class Optimizer(Keys):
    """GPT-NeoX's `optimizer`; weight_decay stands at top level."""

    type: Literal["Adam", "AdamW", "adam", "adamw"] = key(
        "AdamW", "Both names mean AdamW (decoupled decay), as in GPT-NeoX."
    )
    params: OptimizerParams = required("lr, betas, eps.")


class LrOverride(Keys):
    """From iteration `at` on, the scheduled learning rate is multiplied by `scale`; several multiply together."""

    at: int = required("Iteration from which the factor holds.", ge=0)
    scale: float = required("Factor on the scheduled learning rate.", ge=0)


class Zero(Keys):
    """The part of DeepSpeed's `zero_optimization` that a pipeline can use."""

    stage: int = key(1, "ZeRO stage; only 1 is right in the pipeline engine.")
    allgather_partitions: bool = key(True, "Gather updated weights by all-gather instead of broadcasts.")
    reduce_scatter: bool = key(True, "Reduce gradients by reduce-scatter.")
    allgather_bucket_size: int = key(500_000_000, "Elements in one all-gather.", gt=0)
    reduce_bucket_size: int = key(500_000_000, "Elements in one reduction.", gt=0)
    contiguous_gradients: bool = key(False, "Copy gradients to one buffer as they arrive.")
    overlap_comm: bool = key(False, "No effect: the pipeline engine turns overlapping off.")
    cpu_offload: Literal[False] = key(False, "Not supported.")


class Bf16(Keys):
    enabled: bool = key(False, "Train in bf16 with fp32 master weights and fp32 gradient accumulation.")
    check_grad_overflow: bool = key(True, "Skip a step whose gradients hold an infinity or NaN.")


class DataTypes(Keys):
    grad_accum_dtype: Literal["fp32"] = key("fp32", "Gradients are always accumulated in fp32.")


class OptimizationKeys(Keys):
    train_iters: int = derived("train_epochs and the size of the data, when these are read", "Optimizer steps.", ge=0)
    train_epochs: float | None = key(
        None,
        "Length of the run in passes over the training sources without replay, in the place of train_iters; 0.6 is "
        "most of one.",
        gt=0,
    )
    train_micro_batch_size_per_gpu: int = derived(
        "train_batch_size / (gradient_accumulation_steps x data_parallel_size)",
        "Sequences in one forward pass of a data-parallel rank.",
        gt=0,
    )
    gradient_accumulation_steps: int = derived(
        "train_batch_size / (micro x data_parallel_size), else 1",
        "Micro-batches per step; a pipeline wants several times its number of stages.",
        gt=0,
    )
    train_batch_size: int = derived(
        "micro x accumulation x data_parallel_size", "Sequences in one optimizer step, over all ranks.", gt=0
    )
    optimizer: Optimizer = derived("nothing: training needs it", "Optimizer type and its params: lr, betas, eps.")
    weight_decay: float = key(0.1, "Decay of matrices (embedding and head included); norms have none.", ge=0)
    gradient_clipping: float = key(1.0, "Global L2 norm above which gradients are scaled down; 0 is off.", ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = key("linear", "Shape of the schedule after warm-up.")
    lr_decay_iters: int = derived(
        "train_iters x lr_decay_fraction, else train_iters", "Iteration at which the decay reaches min_lr.", gt=0
    )
    lr_decay_fraction: float | None = key(None, "lr_decay_iters as a share of train_iters.", gt=0)
    warmup: float = key(0.01, "Share of lr_decay_iters with linearly rising learning rate.", ge=0, le=1)
    min_lr: float = key(0.0, "Floor of the schedule; it stays there after lr_decay_iters.", ge=0)
    lr_overrides: list[LrOverride] = key(
        [], "Manual factors on the schedule, each from an iteration on: [{at: 1200, scale: 0.5}].", ours=True
    )
    precision: Literal["auto", "fp32", "bfloat16"] = derived(
        "bfloat16 if that mapping is enabled, else fp32",
        "fp32 and bfloat16 are honoured everywhere. auto picks bfloat16 where the device computes in it and fp32 "
        "on a CPU that would emulate it.",
    )
    bf16: Bf16 | None = key(None, "DeepSpeed's bf16 mapping.")
    data_types: DataTypes | None = key(None, "Accepted from GPT-NeoX configurations; fp32 accumulation is always on.")
    zero_optimization: Zero = key(Zero(), "ZeRO options; stage 1 always.")
    checkpoint_activations: bool = key(
        False, "Recompute each decoder layer in the backward pass instead of storing it."
    )
    recompute_layers: int | None = key(
        None,
        "With checkpoint_activations, how many decoder layers of each stage are recomputed, the first ones; all if "
        "not given. Each one less saves its forward pass and costs what a layer stores; --dry-run says how many fit.",
        ours=True,
        gt=0,
    )
    checkpoint_num_layers: Literal[1] = key(1, "Layers recomputed together; 1 is the only right interval here.")
    deepspeed_extra_args: dict[str, Any] = Field(
        default={},
        description="Options handed to DeepSpeed as they are; a key that this schema knows is refused here.",
        json_schema_extra={"x-ours": False},
    )
