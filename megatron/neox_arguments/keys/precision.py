"""Keys of the precision and their rules: fp32, bfloat16, or fp16 with loss scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron.common.errors import ConfigError
from megatron.neox_arguments.host_cpu import native_bf16_cpu
from megatron.neox_arguments.keys.fields import Keys, derived, key
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class Bf16(Keys):
    enabled: bool = key(False, "Train in bf16 with fp32 master weights and fp32 gradient accumulation.")
    check_grad_overflow: bool = key(True, "Skip a step whose gradients contain an infinity or NaN.")


class Fp16(Keys):
    """DeepSpeed's loss scaling: the loss is multiplied by the scale, the gradients are divided by it."""

    enabled: bool = key(False, "Train in fp16 with fp32 master weights, fp32 gradient accumulation and loss scaling.")
    loss_scale: float = key(0.0, "Constant loss scale; 0 means dynamic scaling.", ge=0)
    initial_scale_power: int = key(16, "Exponent of the initial loss scale: 2 to this power.", ge=0)
    loss_scale_window: int = key(1000, "Steps without an overflow after which the loss scale doubles.", gt=0)
    hysteresis: int = key(2, "Number of overflows before the loss scale is halved.", gt=0)
    min_loss_scale: float = key(1.0, "Smallest loss scale of dynamic scaling.", gt=0)
    consecutive_hysteresis: bool = key(False, "Restart the count of hysteresis after a step without an overflow.")


class DataTypes(Keys):
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] = key(
        "fp32", "Gradients are always accumulated in fp32; other values are taken as fp32."
    )


class PrecisionKeys(Keys):
    precision: Literal["auto", "fp32", "bfloat16", "fp16"] = derived(
        "that of the enabled mapping (bf16 or fp16), else fp32",
        "Floating-point type of weights and activations. fp32 and bfloat16 are supported everywhere, fp16 on GPUs "
        "only. auto: bfloat16 where the device supports it natively, fp32 on a CPU that would emulate it.",
    )
    bf16: Bf16 | None = key(None, "DeepSpeed's bf16 mapping.")
    fp16: Fp16 | None = key(None, "DeepSpeed's fp16 mapping: loss scaling for precision: fp16.")
    data_types: DataTypes | None = key(
        None, "Accepted from GPT-NeoX configurations; gradients are accumulated in fp32."
    )


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("precision",))
def precision(args: AllKeys, world_size: int | None) -> Derived:
    """Precision of the run and, for `auto`, the reason for the choice."""
    enabled = [
        name
        for name, mapping in (("bfloat16", args.bf16), ("fp16", args.fp16))
        if mapping is not None and mapping.enabled
    ]
    if len(enabled) > 1:
        raise ConfigError("the mappings bf16 and fp16 are both enabled; keep one")
    implied = enabled[0] if enabled else None
    given = args.precision
    if given is None:
        return Derived({"precision": implied or "fp32"})
    if given != "auto":
        if implied and implied != given:
            raise ConfigError(f"precision is {given}, but the mapping of {implied} is enabled; make them agree")
        return Derived({})
    if implied:
        return Derived({"precision": implied})
    if args.device == "cuda":
        chosen, why = "bfloat16", "bfloat16, which the GPU computes natively"
    elif native_bf16_cpu():
        chosen, why = "bfloat16", "bfloat16, which this CPU computes natively"
    else:
        chosen, why = (
            "fp32",
            "fp32, because this CPU has no bfloat16 instructions and emulating bfloat16 was 13 times slower "
            "(precision: bfloat16 does so anyway)",
        )
    return Derived({"precision": chosen}, (f"precision auto: {why}",))


# --- rules


@registry.warning(*ALL_TASKS)
def accumulation_is_in_fp32(args: PrecisionKeys) -> str | None:
    asked = args.data_types.grad_accum_dtype if args.data_types else "fp32"
    if asked == "fp32":
        return None
    return f"data_types: grad_accum_dtype {asked} is taken as fp32: gradients are always accumulated in fp32"
