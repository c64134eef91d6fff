"""Every derived value, in the order in which they depend on each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron.common.errors import ConfigError
from megatron.layout import LlamaShape, padded_vocab_size

if TYPE_CHECKING:
    from megatron.neox_arguments.arguments import NeoXArgs

Task = Literal["train", "eval", "generate", "model"]


@dataclass(frozen=True)
class Resolution:
    values: dict[str, Any]  # keys to set
    notes: list[str]  # lines a user should see: what was chosen and why


def resolve(args: NeoXArgs, task: Task, world_size: int | None) -> Resolution:
    """Values for every key that the user left to us; raises ConfigError where they contradict each other."""
    notes: list[str] = []
    values: dict[str, Any] = {}
    if args.num_kv_heads is None:
        values["num_kv_heads"] = args.num_attention_heads
    values["intermediate_size"] = true_width(args)
    if args.seq_length is None and task in ("model", "generate"):
        values["seq_length"] = args.max_position_embeddings
    if args.pipe_parallel_size == 0:
        values["pipe_parallel_size"] = 1
        notes.append("pipe_parallel_size 0 (GPT-NeoX's sequential model) is taken as 1: one pipeline stage")
    pipe = values.get("pipe_parallel_size", args.pipe_parallel_size)
    values["device"] = args.device or ("cpu" if args.distributed_backend == "gloo" else "cuda")
    values["global_num_gpus"] = ranks(args, pipe, world_size)
    if args.num_nodes == -1:
        values["num_nodes"] = 1
    values["precision"], note = precision(args, values["device"])
    if note:
        notes.append(note)
    if task in ("train", "eval"):
        values |= batch_sizes(args, values["global_num_gpus"], pipe)
    if args.step_timeout_minutes is None:
        values["step_timeout_minutes"] = min(10.0, 0.9 * args.distributed_timeout_minutes)
    if args.lr_decay_iters is None and args.train_iters:
        values["lr_decay_iters"] = decay_iters(args.train_iters, args.lr_decay_fraction)
    return Resolution(values, notes)


def decay_iters(train_iters: int, fraction: float | None) -> int:
    """Iteration at which the learning rate stops falling."""
    return max(1, int(train_iters * (fraction or 1.0)))


def true_width(args: NeoXArgs) -> int:
    """MLP width F. Under the neox convention the key is 3 F, and GPT-NeoX rounds as neox_compat 1.3 describes."""
    given = args.intermediate_size
    if args.intermediate_size_convention == "hf":
        return given
    multiple = args.mlp_multiple_of
    gated = 2 * given // 3
    rows = 2 * multiple * -(-gated // (2 * multiple))
    columns = multiple * -(-(gated // 2) // multiple)
    if rows != 2 * columns:
        raise ConfigError(
            f"intermediate_size {given} with mlp_multiple_of {multiple} gives GPT-NeoX a first MLP matrix of {rows} "
            f"rows and a second of {columns} columns, which do not fit; give 3 x the true width"
        )
    return columns


def ranks(args: NeoXArgs, pipe: int, world_size: int | None) -> int:
    """World size: the launcher's word, then the configuration's, then the smallest that works."""
    started = world_size
    nodes = max(1, args.num_nodes)
    asked = args.global_num_gpus or (nodes * args.num_gpus if args.num_gpus else None)
    if args.global_num_gpus and args.num_gpus and args.global_num_gpus != nodes * args.num_gpus:
        raise ConfigError(
            f"global_num_gpus {args.global_num_gpus} is not num_nodes {nodes} x num_gpus {args.num_gpus}; "
            f"give one of them"
        )
    if started and asked and started != asked:
        raise ConfigError(
            f"{started} ranks were started, but global_num_gpus (or num_nodes x num_gpus) asks for {asked}; "
            f"start {asked} ranks or change the key"
        )
    total = started or asked or pipe * args.model_parallel_size
    per_copy = pipe * args.model_parallel_size
    if total % per_copy:
        raise ConfigError(
            f"{total} ranks cannot be divided into pipe_parallel_size {pipe} x model_parallel_size "
            f"{args.model_parallel_size} = {per_copy}; use a multiple of {per_copy} ranks"
        )
    return total


def batch_sizes(args: NeoXArgs, total_ranks: int, pipe: int) -> dict[str, int]:
    """train_batch_size = micro x accumulation x data_parallel_size, from whichever of the three are given."""
    data = total_ranks // (pipe * args.model_parallel_size)
    batch, micro = args.train_batch_size, args.train_micro_batch_size_per_gpu
    steps = args.gradient_accumulation_steps
    if batch is None and micro is None:
        raise ConfigError("the batch size is missing: give train_micro_batch_size_per_gpu or train_batch_size")
    if micro is None:
        steps = steps or 1
        micro = whole(batch, steps * data, f"gradient_accumulation_steps {steps} x data_parallel_size {data}")
    elif steps is None:
        steps = whole(batch, micro * data, f"micro-batch {micro} x data_parallel_size {data}") if batch else 1
    product = micro * steps * data
    if batch is not None and batch != product:
        raise ConfigError(
            f"train_batch_size {batch} is not micro-batch {micro} x gradient_accumulation_steps {steps} x "
            f"data_parallel_size {data} = {product}; leave one of the three out or make them agree"
        )
    return {
        "train_batch_size": product,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }


def whole(batch: int, divisor: int, what: str) -> int:
    if batch % divisor:
        nearest = max(divisor, round(batch / divisor) * divisor)
        raise ConfigError(f"train_batch_size {batch} is not a multiple of {what} = {divisor}; {nearest} is")
    return batch // divisor


def precision(args: NeoXArgs, device: str) -> tuple[str, str | None]:
    """Precision of the run and, for `auto`, the line that says why."""
    implied = "bfloat16" if args.bf16 and args.bf16.enabled else None
    given = args.precision
    if given is None:
        return implied or "fp32", None
    if given != "auto":
        if implied and implied != given:
            raise ConfigError(f"precision is {given}, but the mapping of {implied} is enabled; make them agree")
        return given, None
    if implied:
        return implied, None
    if device == "cuda":
        return "bfloat16", "precision auto: bfloat16, which the GPU computes natively"
    if native_bf16_cpu():
        return "bfloat16", "precision auto: bfloat16, which this CPU computes natively"
    return "fp32", (
        "precision auto: fp32, because this CPU has no bfloat16 instructions and emulating them was 13 times slower "
        "(precision: bfloat16 does it anyway)"
    )


def native_bf16_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has bf16 matrix or dot-product instructions (x86: AMX or AVX-512 BF16; Arm: bf16)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags.split()))
    return False


def shape(args: NeoXArgs) -> LlamaShape:
    return LlamaShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_kv_heads=args.num_kv_heads,
        intermediate_size=args.intermediate_size,
        vocab_size=args.vocab_size,
        padded_vocab_size=padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, args.model_parallel_size
        ),
        tied=not args.no_weight_tying,
    )
