"""Keys of the optimization and their rules: optimizer, schedule, batch, ZeRO, activation checkpointing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron.common.errors import ConfigError
from megatron.neox_arguments.deepspeed_config import deepspeed_dictionary
from megatron.neox_arguments.keys.fields import Keys, derived, key, required
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class OptimizerParams(Keys):
    lr: float = required("Peak learning rate.", ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = key(
        [0.9, 0.999], "Decay rates of Adam's two moments. Llama: [0.9, 0.95].", min_length=2, max_length=2
    )
    eps: float = key(1e-8, "Added to the square root of the second moment.", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _decay_is_elsewhere(cls, value: Any) -> Any:
        if isinstance(value, dict) and "weight_decay" in value:
            raise ValueError("weight_decay is a top-level key, not part of optimizer.params; move it")
        return value


class Optimizer(Keys):
    """GPT-NeoX's `optimizer`; weight_decay is a top-level key."""

    type: Literal["Adam", "AdamW", "adam", "adamw"] = key(
        "AdamW", "Adam and AdamW both mean AdamW (decoupled decay), as in GPT-NeoX."
    )
    params: OptimizerParams = required("lr, betas, eps.")


class LrOverride(Keys):
    """From iteration `at` on, the scheduled learning rate is multiplied by `scale`; several multiply together."""

    at: int = required("Iteration from which the factor applies.", ge=0)
    scale: float = required("Factor on the scheduled learning rate.", ge=0)


class Zero(Keys):
    """The options of DeepSpeed's `zero_optimization` that a pipeline can use."""

    stage: int = key(1, "ZeRO stage: always 1; 0 is taken as 1.")
    allgather_partitions: bool = key(True, "Gather updated weights by all-gather instead of broadcasts.")
    reduce_scatter: bool = key(True, "Reduce gradients by reduce-scatter.")
    allgather_bucket_size: int = key(500_000_000, "Number of elements per all-gather.", gt=0)
    reduce_bucket_size: int = key(500_000_000, "Number of elements per reduction.", gt=0)
    contiguous_gradients: bool = key(False, "Copy gradients to one contiguous buffer as they are computed.")
    cpu_offload: Literal[False] = key(False, "Keep optimizer states in host memory: not supported.")


class OptimizationKeys(Keys):
    train_iters: int = derived(
        "computed from train_epochs once the data have been read", "Number of optimizer steps.", ge=0
    )
    train_epochs: float | None = key(
        None,
        "Length of the run in passes over the training sources without replay, instead of train_iters; fractions are "
        "allowed.",
        gt=0,
    )
    train_micro_batch_size_per_gpu: int = derived(
        "train_batch_size / (gradient_accumulation_steps x data_parallel_size)",
        "Micro-batch size: sequences per forward pass of a data-parallel rank.",
        gt=0,
    )
    gradient_accumulation_steps: int = derived(
        "train_batch_size / (micro-batch x data_parallel_size), else 1",
        "Micro-batches per optimizer step; a pipeline needs several times as many as it has stages.",
        gt=0,
    )
    train_batch_size: int = derived(
        "micro-batch x accumulation x data_parallel_size",
        "Global batch size: sequences per optimizer step, over all ranks.",
        gt=0,
    )
    optimizer: Optimizer = derived("none; required for training", "Optimizer type and its params: lr, betas, eps.")
    weight_decay: float = key(0.1, "Weight decay of matrices, including embedding and head; norms have none.", ge=0)
    gradient_clipping: float = key(1.0, "Global L2 norm to which larger gradients are scaled down; 0 is off.", ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential", "wsd"] = key(
        "linear",
        "Shape of the learning rate's schedule after warm-up. exponential falls to half the peak by lr_decay_iters, as "
        "in GPT-NeoX; wsd stays at the peak until a cooldown at the end.",
    )
    lr_decay_iters: int = derived(
        "train_iters x lr_decay_fraction, else train_iters",
        "Iteration at which the decay ends; the learning rate is constant from then on.",
        gt=0,
    )
    lr_decay_fraction: float | None = key(None, "lr_decay_iters as a fraction of train_iters.", gt=0)
    warmup: float = key(0.01, "Length of the linear warm-up as a fraction of lr_decay_iters.", ge=0, le=1)
    lr_warmup_iters: int | None = key(
        None, "Length of the linear warm-up in iterations, instead of warmup.", ours=True, ge=0
    )
    lr_wsd_decay_iters: int | None = key(
        None, "wsd: length of the cooldown in iterations; it ends at lr_decay_iters. 0 is none.", ours=True, ge=0
    )
    lr_wsd_decay_fraction: float | None = key(
        None,
        "wsd: length of the cooldown as a fraction of lr_decay_iters, instead of lr_wsd_decay_iters.",
        ours=True,
        gt=0,
        le=1,
    )
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = key(
        "linear",
        "wsd: shape of the cooldown from peak to min_lr. After a fraction x of it, exponential leaves 2 x 0.5^x - 1 of "
        "the distance, minus_sqrt 1 - sqrt(x).",
        ours=True,
    )
    lr_restart_iter: int = key(
        0,
        "Iteration at which the schedule of a continued run restarts: the rate rises again from min_lr, over "
        "lr_warmup_iters or, with warmup, a fraction of the iterations left until lr_decay_iters. 0: no restart.",
        ours=True,
        ge=0,
    )
    min_lr: float = key(0.0, "Lowest learning rate of the decay.", ge=0)
    lr_overrides: list[LrOverride] = key(
        [], "Manual factors on the learning rate, each from an iteration on: [{at: 1200, scale: 0.5}].", ours=True
    )
    zero_optimization: Zero = key(Zero(), "ZeRO options; the stage is always 1.")
    checkpoint_activations: bool = key(
        False, "Recompute each decoder layer in the backward pass instead of storing its activations."
    )
    recompute: Literal["none", "selective", "full"] = derived(
        "full with checkpoint_activations, else none",
        "What the backward pass recomputes. none: nothing; selective: norms, SwiGLU and the attention core, but no "
        "matrix products (engine: megatron only); full: whole decoder layers, like checkpoint_activations. GPT-NeoX's "
        "values true and false, which concern text generation, have no effect.",
        ours=True,
    )
    recompute_layers: int | None = key(
        None,
        "With checkpoint_activations, how many decoder layers of each stage are recomputed, counted from its first; by "
        "default all. Each layer that is not saves a forward pass but stores its activations; --dry-run shows what "
        "fits.",
        ours=True,
        gt=0,
    )
    checkpoint_num_layers: int = key(
        1, "Number of layers recomputed together; always taken as 1, which does not change results.", gt=0
    )
    deepspeed_extra_args: dict[str, Any] = Field(
        default={},
        description="Options passed to DeepSpeed unchanged; those that other keys set or check are refused.",
        json_schema_extra={"x-ours": False},
    )

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.optimizer.params.lr


# --- derivations


@registry.derivation(
    *("train", "eval", "mcq", "embed"),
    fills=("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
)
def batch_sizes(args: AllKeys, world_size: int | None) -> Derived:
    """train_batch_size = micro x accumulation x data_parallel_size, from whichever of the three are given."""
    data = args.data_parallel_size
    batch, micro = args.train_batch_size, args.train_micro_batch_size_per_gpu
    steps = args.gradient_accumulation_steps
    if batch is None and micro is None:
        raise ConfigError("the batch size is missing: give train_micro_batch_size_per_gpu or train_batch_size")
    if micro is None:
        steps = steps or 1
        micro = _quotient(batch, steps * data, f"gradient_accumulation_steps {steps} x data_parallel_size {data}")
    elif steps is None:
        if batch is not None and batch % (micro * data):
            raise ConfigError(_unfit_replicas(batch, micro, data))
        steps = batch // (micro * data) if batch else 1
    product = micro * steps * data
    if batch is not None and batch != product:
        raise ConfigError(
            f"train_batch_size {batch} is not micro-batch {micro} x gradient_accumulation_steps {steps} x "
            f"data_parallel_size {data} = {product}; leave one of the three out or make them agree"
        )
    return Derived(
        {
            "train_batch_size": product,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": steps,
        }
    )


def _unfit_replicas(batch: int, micro: int, data: int) -> str:
    """Why a batch cannot be split over `data` replicas, and the numbers of replicas it could be split over."""
    fewer = [n for n in range(1, data) if batch % (micro * n) == 0]
    more = [n for n in range(data + 1, 4 * data) if batch % (micro * n) == 0]
    sizes = " or ".join(map(str, fewer[-1:] + more[:1])) or "no other"
    nearest = max(1, round(batch / (micro * data))) * micro * data
    return (
        f"train_batch_size {batch} is not a multiple of micro-batch {micro} x data_parallel_size {data} = "
        f"{micro * data}; {nearest} is. To keep the batch, change the number of ranks, pipe_parallel_size or "
        f"model_parallel_size so that data_parallel_size is {sizes}"
    )


def _quotient(batch: int, divisor: int, what: str) -> int:
    """`batch / divisor`; raises ConfigError with the nearest multiple if that is not a whole number."""
    if batch % divisor:
        nearest = max(divisor, round(batch / divisor) * divisor)
        raise ConfigError(f"train_batch_size {batch} is not a multiple of {what} = {divisor}; {nearest} is")
    return batch // divisor


@registry.derivation(*ALL_TASKS, fills=("zero_optimization",))
def stage_0_is_stage_1(args: OptimizationKeys, world_size: int | None) -> Derived:
    """Stage 0 clips gradients incorrectly in DeepSpeed's pipeline engine, which computes no global norm there."""
    if args.zero_optimization.stage != 0:
        return Derived({})
    note = (
        "zero_optimization stage 0 is taken as 1: the same updates, with optimizer states sharded over data-parallel "
        "ranks"
    )
    return Derived({"zero_optimization": args.zero_optimization.model_copy(update={"stage": 1})}, (note,))


@registry.derivation(*ALL_TASKS, fills=("lr_decay_iters",))
def decay_length(args: OptimizationKeys, world_size: int | None) -> Derived:
    if args.lr_decay_iters is not None or not args.train_iters:
        return Derived({})
    return Derived({"lr_decay_iters": decay_iters(args.train_iters, args.lr_decay_fraction)})


def decay_iters(train_iters: int, fraction: float | None) -> int:
    """Iteration at which the learning rate stops falling."""
    return max(1, int(train_iters * (fraction or 1.0)))


@registry.derivation(*ALL_TASKS, fills=("recompute", "checkpoint_activations"))
def what_is_recomputed(args: AllKeys, world_size: int | None) -> Derived:
    whole_layers = args.checkpoint_activations
    if args.recompute is None:
        return Derived({"recompute": "full" if whole_layers else "none"})
    if args.recompute == "full":
        if args.merged.get("checkpoint_activations") is False:
            raise ConfigError("recompute: full contradicts checkpoint_activations: false; keep one of them")
        return Derived({"checkpoint_activations": True})
    if whole_layers:
        raise ConfigError(
            f"recompute: {args.recompute} contradicts checkpoint_activations: true, which recomputes whole layers; "
            f"keep one of them"
        )
    return Derived({})


def warmup_length(args: OptimizationKeys, lr_decay_iters: int) -> float:
    """Iterations of the warm-up, which need not be a whole number."""
    if args.lr_warmup_iters is not None:
        return args.lr_warmup_iters
    return args.warmup * (lr_decay_iters - args.lr_restart_iter)


def cooldown_length(args: OptimizationKeys, lr_decay_iters: int) -> int:
    """Iterations of the cooldown of `wsd`."""
    if args.lr_wsd_decay_iters is not None:
        return args.lr_wsd_decay_iters
    return int(lr_decay_iters * (args.lr_wsd_decay_fraction or 0.0))


def schedule_problem(args: OptimizationKeys, lr_decay_iters: int) -> str | None:
    """Why warm-up and cooldown do not fit into a schedule that ends at `lr_decay_iters`."""
    begin = args.lr_restart_iter
    if begin and begin >= lr_decay_iters:
        return (
            f"lr_restart_iter {begin} is not before the schedule's end at iteration {lr_decay_iters}; raise "
            f"train_iters (or lr_decay_iters), or lower lr_restart_iter"
        )
    warm, cool = warmup_length(args, lr_decay_iters), cooldown_length(args, lr_decay_iters)
    if args.lr_decay_style != "wsd" or warm + cool <= lr_decay_iters - begin:
        return None
    return (
        f"a warm-up of {warm:g} and a cooldown of {cool} iterations do not fit into the {lr_decay_iters - begin} "
        f"iterations from {begin} to the schedule's end at {lr_decay_iters}; shorten one, or raise train_iters"
    )


# --- rules


@registry.rule(*ALL_TASKS)
def zero_stage_is_one(args: OptimizationKeys) -> str | None:
    stage = args.zero_optimization.stage
    if stage in (0, 1):
        return None
    return (
        f"zero_optimization stage {stage} splits gradients or weights, which DeepSpeed cannot do together with "
        f"pipeline stages; write stage: 1"
    )


@registry.rule("train")
def recomputation_is_of_layers(args: AllKeys) -> str | None:
    if args.recompute_layers is None:
        return None
    if not args.checkpoint_activations:
        return (
            f"recompute_layers {args.recompute_layers} has no effect without checkpoint_activations: true, which turns "
            f"recomputation on; give both, or neither to store everything"
        )
    most = -(-args.num_layers // args.pipe_parallel_size)
    if args.recompute_layers <= most:
        return None
    return (
        f"recompute_layers {args.recompute_layers} counts the layers of one stage, but with {args.num_layers} layers "
        f"over {args.pipe_parallel_size} stages a stage has at most {most}; leave it out to recompute all"
    )


@registry.rule("train")
def selective_recomputation_is_of_engine_megatron(args: AllKeys) -> str | None:
    if args.recompute != "selective" or args.engine == "megatron":
        return None
    return (
        "recompute: selective is not available with engine: deepspeed, which recomputes whole layers only; write "
        "engine: megatron, or checkpoint_activations: true instead of recompute"
    )


@registry.rule("train")
def training_has_a_length(args: OptimizationKeys) -> str | None:
    if args.train_iters is not None and args.train_epochs is not None:
        return "train_iters and train_epochs are both given; keep one"
    if args.train_iters is not None or args.train_epochs is not None:
        return None
    return "train_iters is missing: the number of optimizer steps (or train_epochs, passes over the data)"


@registry.rule("train")
def training_has_an_optimizer(args: OptimizationKeys) -> str | None:
    if args.optimizer is not None:
        return None
    return "optimizer is missing: write optimizer: {type: AdamW, params: {lr: 3.0e-5, betas: [0.9, 0.95], eps: 1.0e-8}}"


# A data key, but reported together with everything else a step needs.
@registry.rule("train", "eval")
def samples_have_a_length(args: AllKeys) -> str | None:
    return None if args.seq_length is not None else "seq_length is missing: the number of tokens per sample"


@registry.rule("train")
def floor_is_below_peak(args: OptimizationKeys) -> str | None:
    if args.optimizer is None or args.min_lr <= args.lr:
        return None
    return f"min_lr {args.min_lr} is above the peak learning rate {args.lr}; lower min_lr"


@registry.rule("train")
def decay_length_is_given_once(args: AllKeys) -> str | None:
    if args.lr_decay_fraction is None or args.merged.get("lr_decay_iters") is None:
        return None
    return "lr_decay_iters and lr_decay_fraction are both given; keep one"


@registry.rule("train")
def warmup_is_given_once(args: AllKeys) -> str | None:
    if args.lr_warmup_iters is None or args.merged.get("warmup") is None:
        return None
    return "warmup and lr_warmup_iters are both given; keep one"


@registry.rule("train")
def wsd_has_one_cooldown(args: AllKeys) -> str | None:
    given = [name for name in ("lr_wsd_decay_iters", "lr_wsd_decay_fraction") if getattr(args, name) is not None]
    if args.lr_decay_style != "wsd":
        given += ["lr_wsd_decay_style"] if args.merged.get("lr_wsd_decay_style") is not None else []
        return f"{given[0]} applies to lr_decay_style: wsd, not {args.lr_decay_style}; leave it out" if given else None
    if len(given) == 1:
        return None
    return (
        f"lr_decay_style: wsd needs one of lr_wsd_decay_iters and lr_wsd_decay_fraction, the length of its cooldown, "
        f"but {len(given)} are given; write lr_wsd_decay_iters: 0 for a run that is only branched from"
    )


@registry.rule("train")
def schedule_fits(args: OptimizationKeys) -> str | None:
    return schedule_problem(args, args.lr_decay_iters) if args.lr_decay_iters else None


@registry.rule(*ALL_TASKS)
def extra_args_do_not_collide(args: AllKeys) -> str | None:
    known = set(type(args).model_fields) | set(deepspeed_dictionary(args, with_extra=False))
    hidden = {"bfloat16", "scheduler", "amp", "zero_allow_untested_optimizer", "sequence_parallel_size"}
    collisions = sorted(set(args.deepspeed_extra_args) & (known | hidden))
    if not collisions:
        return None
    return (
        f"deepspeed_extra_args: {', '.join(collisions)} would override what this configuration sets or checks; "
        f"write it at top level (if there is a key for it) or remove it"
    )


@registry.warning("train")
def layers_are_recomputed_one_by_one(args: OptimizationKeys) -> str | None:
    if args.checkpoint_num_layers == 1 or not args.checkpoint_activations:
        return None
    return (
        f"checkpoint_num_layers {args.checkpoint_num_layers} is taken as 1: layers are recomputed one by one, which "
        f"changes memory and time but not the results"
    )
