"""Every rule between keys, one named function each. All run before a process is started or a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.common.errors import ConfigError

if TYPE_CHECKING:
    from megatron.neox_arguments.arguments import NeoXArgs
    from megatron.neox_arguments.derived import Task

Rule = Callable[["NeoXArgs"], "str | None"]
RULES: list[tuple[tuple[str, ...], Rule]] = []
WARNINGS: list[tuple[tuple[str, ...], Rule]] = []

_ALL = ("train", "eval", "generate", "model")
_RUN = ("train", "eval")
_TRAIN = ("train",)


def _rule(*tasks: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.append((tasks, function))
        return function

    return register


def _warning(*tasks: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        WARNINGS.append((tasks, function))
        return function

    return register


def problems(args: NeoXArgs, task: Task) -> list[str]:
    """What is wrong, one sentence each, in the order of this file."""
    return [text for tasks, function in RULES if task in tasks and (text := function(args))]


def warnings(args: NeoXArgs, task: Task) -> list[str]:
    return [text for tasks, function in WARNINGS if task in tasks and (text := function(args))]


# --- the model


@_rule(*_ALL)
def heads_divide_hidden(args: NeoXArgs) -> str | None:
    if args.hidden_size % args.num_attention_heads == 0 and args.head_dim % 2 == 0:
        return None
    return (
        f"hidden_size {args.hidden_size} is not num_attention_heads {args.num_attention_heads} x an even head "
        f"dimension; change one of them"
    )


@_rule(*_ALL)
def kv_heads_divide_heads(args: NeoXArgs) -> str | None:
    if args.num_attention_heads % args.num_kv_heads == 0:
        return None
    return (
        f"num_kv_heads {args.num_kv_heads} does not divide num_attention_heads {args.num_attention_heads}; each "
        f"key/value head serves the same number of query heads"
    )


@_rule(*_ALL)
def width_is_true(args: NeoXArgs) -> str | None:
    width = args.intermediate_size
    if width <= 6 * args.hidden_size:
        return None
    return (
        f"intermediate_size {width} is wider than 6 x hidden_size {args.hidden_size}: it looks like GPT-NeoX's 3 x the "
        f"true width. Write intermediate_size: {width // 3}, as in the Hugging Face config, or "
        f"intermediate_size_convention: neox if {width} is meant as 3 x {width // 3}"
    )


@_rule(*_ALL)
def mlp_multiple_divides_width(args: NeoXArgs) -> str | None:
    if args.intermediate_size % args.mlp_multiple_of == 0:
        return None
    return (
        f"mlp_multiple_of {args.mlp_multiple_of} does not divide intermediate_size {args.intermediate_size}; the "
        f"width is never rounded here, leave mlp_multiple_of out"
    )


@_rule(*_ALL)
def whole_head_rotates(args: NeoXArgs) -> str | None:
    if args.rotary_pct == 1.0:
        return None
    return f"rotary_pct {args.rotary_pct}: Llama rotates the whole head; leave it out or write 1.0"


@_rule(*_ALL)
def rope_frequencies_are_ordered(args: NeoXArgs) -> str | None:
    scaling = args.rope_scaling
    if scaling is None or scaling.low_freq_factor < scaling.high_freq_factor:
        return None
    return (
        f"rope_scaling: low_freq_factor {scaling.low_freq_factor} must be below high_freq_factor "
        f"{scaling.high_freq_factor} (Llama-3.1: 1.0 and 4.0)"
    )


@_rule(*_ALL)
def attention_is_dense(args: NeoXArgs) -> str | None:
    names = list(_attention_types(args.attention_config or []))
    other = sorted({str(name) for name in names if name not in ("flash", "global")})
    if not other:
        return None
    return f"attention_config: {', '.join(other)} not supported; Llama's layers are all dense: flash or global"


def _attention_types(config: list) -> list[object]:
    """Types named in `[[[flash, global], 80]]` or `[flash, global, ...]`."""
    names: list[object] = []
    for entry in config:
        types = entry[0] if isinstance(entry, list) and entry else entry
        names += types if isinstance(types, list) else [types]
    return names


@_rule(*_ALL)
def positions_cover_sequence(args: NeoXArgs) -> str | None:
    if args.seq_length is None or args.seq_length <= args.max_position_embeddings:
        return None
    return (
        f"seq_length {args.seq_length} is longer than max_position_embeddings {args.max_position_embeddings}; "
        f"shorten seq_length"
    )


# --- the layout


@_rule(*_ALL)
def tensors_divide_by_tensor_parallelism(args: NeoXArgs) -> str | None:
    if args.num_attention_heads % args.num_kv_heads or args.hidden_size % args.num_attention_heads:
        return None  # said above
    try:
        args.shape.check_tensor_parallel(args.model_parallel_size)
    except ValueError as error:
        return str(error)
    return None


@_rule(*_ALL)
def every_stage_has_a_layer(args: NeoXArgs) -> str | None:
    if args.pipe_parallel_size <= args.num_layers:
        return None
    return (
        f"pipe_parallel_size {args.pipe_parallel_size} is more than num_layers {args.num_layers}: a stage would have "
        f"no layer; use at most {args.num_layers}"
    )


@_warning(*_RUN)
def stages_are_uneven(args: NeoXArgs) -> str | None:
    """Legal, as in GPT-NeoX, but the step waits for the longest stage."""
    layers, stages = args.num_layers, args.pipe_parallel_size
    if layers % stages == 0:
        return None
    return (
        f"{layers} layers on {stages} pipeline stages: some stages hold {-(-layers // stages)} layers, some "
        f"{layers // stages}, and the step waits for the longest"
    )


@_rule(*_ALL)
def device_fits_backend(args: NeoXArgs) -> str | None:
    if args.distributed_backend == "nccl" and args.device == "cpu":
        return "distributed_backend nccl needs GPUs, but device is cpu; write distributed_backend: gloo"
    return None


@_rule(*_ALL)
def nodes_hold_whole_numbers_of_ranks(args: NeoXArgs) -> str | None:
    if args.global_num_gpus % max(1, args.num_nodes) == 0:
        return None
    return f"{args.global_num_gpus} ranks cannot be spread evenly over num_nodes {args.num_nodes}"


# --- optimisation


@_rule(*_ALL)
def zero_stage_is_one(args: NeoXArgs) -> str | None:
    stage = args.zero_optimization.stage
    if stage == 1:
        return None
    if stage == 0:
        return (
            "zero_optimization stage 0 clips gradients wrongly in DeepSpeed's pipeline engine (it has no global norm); "
            "write stage: 1, which is right also with one data-parallel rank"
        )
    return (
        f"zero_optimization stage {stage} splits gradients or weights, which DeepSpeed cannot do together with "
        f"pipeline stages; write stage: 1"
    )


@_rule(*_TRAIN)
def recomputation_is_of_layers(args: NeoXArgs) -> str | None:
    if args.recompute_layers is None:
        return None
    if not args.checkpoint_activations:
        return (
            f"recompute_layers {args.recompute_layers} without checkpoint_activations: true, which is what recomputes; "
            f"give both, or neither to store everything"
        )
    most = -(-args.num_layers // args.pipe_parallel_size)
    if args.recompute_layers <= most:
        return None
    return (
        f"recompute_layers {args.recompute_layers} counts layers of one stage, and a stage of {args.num_layers} layers "
        f"over {args.pipe_parallel_size} stages has at most {most}; leave it out to recompute all"
    )


@_rule(*_TRAIN)
def training_has_a_length(args: NeoXArgs) -> str | None:
    if args.train_iters is not None and args.train_epochs is not None:
        return "train_iters and train_epochs are both given; keep one"
    if args.train_iters is not None or args.train_epochs is not None:
        return None
    return "train_iters is missing: the number of optimizer steps (or train_epochs, passes over the data)"


@_rule(*_TRAIN)
def training_has_an_optimizer(args: NeoXArgs) -> str | None:
    if args.optimizer is not None:
        return None
    return "optimizer is missing: write optimizer: {type: AdamW, params: {lr: 3.0e-5, betas: [0.9, 0.95], eps: 1.0e-8}}"


@_rule(*_RUN)
def samples_have_a_length(args: NeoXArgs) -> str | None:
    return None if args.seq_length is not None else "seq_length is missing: the number of tokens per sample"


@_rule(*_TRAIN)
def floor_is_below_peak(args: NeoXArgs) -> str | None:
    if args.optimizer is None or args.min_lr <= args.lr:
        return None
    return f"min_lr {args.min_lr} is above the peak learning rate {args.lr}; lower min_lr"


@_rule(*_TRAIN)
def one_word_on_decay_length(args: NeoXArgs) -> str | None:
    if args.lr_decay_fraction is None or "lr_decay_iters" not in args.merged:
        return None
    return "lr_decay_iters and lr_decay_fraction are both given; keep one"


@_rule(*_ALL)
def extra_args_do_not_collide(args: NeoXArgs) -> str | None:
    from megatron.neox_arguments.deepspeed_config import build

    known = set(type(args).model_fields) | set(build(args, with_extra=False))
    hidden = {"bfloat16", "scheduler", "amp", "zero_allow_untested_optimizer", "sequence_parallel_size"}
    collisions = sorted(set(args.deepspeed_extra_args) & (known | hidden))
    if not collisions:
        return None
    return (
        f"deepspeed_extra_args: {', '.join(collisions)} would override what this configuration sets or checks; "
        f"write it at top level (if there is a key for it) or remove it"
    )


# --- data


@_rule(*_ALL)
def one_source_of_data(args: NeoXArgs) -> str | None:
    lists = [name for name in ("train_data_paths", "valid_data_paths", "test_data_paths") if getattr(args, name)]
    if args.data_path and lists:
        return f"data_path and {', '.join(lists)} exclude each other: data_path is divided by split; keep one way"
    return None


@_rule(*_TRAIN)
def training_has_data(args: NeoXArgs) -> str | None:
    if args.data_path or args.train_data_paths:
        return None
    return "no training data: give train_data_paths (or data_path with split)"


@_rule(*_ALL)
def weights_match_paths(args: NeoXArgs) -> str | None:
    for part in ("train", "valid", "test"):
        paths, weights = getattr(args, f"{part}_data_paths"), getattr(args, f"{part}_data_weights")
        if weights is None:
            continue
        weighted = [path for path in paths or [] if isinstance(path, str) or path.replay is None]
        if len(weights) != len(weighted):
            return (
                f"{part}_data_weights has {len(weights)} entries for {len(weighted)} {part}_data_paths without replay"
            )
        if min(weights, default=0) < 0 or sum(weights) <= 0:
            return f"{part}_data_weights {weights}: weights are not negative and not all zero"
    return None


@_rule(*_ALL)
def replay_leaves_something(args: NeoXArgs) -> str | None:
    replays = [None if isinstance(path, str) else path.replay for path in args.train_data_paths or []]
    total = sum(replay.share for replay in replays if replay is not None)
    if total < 1 and (None in replays or not replays):
        return None
    return (
        f"the replay shares of train_data_paths sum to {total:g} and {replays.count(None)} sources have no replay; "
        f"replay accompanies other sources, so leave some share to at least one"
    )


@_rule(*_ALL)
def labels_match_paths(args: NeoXArgs) -> str | None:
    for part in ("train", "valid", "test"):
        paths, labels = getattr(args, f"{part}_data_paths"), getattr(args, f"{part}_label_data_paths")
        if labels is not None and len(labels) != len(paths or []):
            return f"{part}_label_data_paths has {len(labels)} entries for {len(paths or [])} {part}_data_paths"
    return None


@_rule(*_RUN)
def chopping_has_an_effect(args: NeoXArgs) -> str | None:
    if args.allow_chopped or args.pack_impl != "packed":
        return None
    return (
        "allow_chopped: false has no effect with pack_impl: packed, which cuts every document where a sample ends; "
        "choose pack_until_overflow, unpacked or best_fit to keep documents whole"
    )


@_rule(*_RUN)
def document_ends_are_known(args: NeoXArgs) -> str | None:
    if args.vocab_file or not args.eod_mask_loss:
        return None
    return "eod_mask_loss needs the end-of-document token: give vocab_file, the tokenizer's file"


@_rule(*_TRAIN)
def skipped_ranges_are_ranges(args: NeoXArgs) -> str | None:
    wrong = [pair for pair in args.skip_sample_ranges if len(pair) != 2 or not 0 <= pair[0] < pair[1]]
    if not wrong:
        return None
    return f"skip_sample_ranges: {wrong[0]} is no range of samples; write [first, end] with 0 <= first < end"


# --- survival


@_rule("train", "eval", "generate")
def a_step_ends_before_its_collectives(args: NeoXArgs) -> str | None:
    if args.step_timeout_minutes < args.distributed_timeout_minutes:
        return None
    return (
        f"step_timeout_minutes {args.step_timeout_minutes:g} is not below distributed_timeout_minutes "
        f"{args.distributed_timeout_minutes}: a collective would give up before the watchdog can name the ranks that "
        f"did not arrive; lower it, or raise distributed_timeout_minutes"
    )


@_rule(*_TRAIN)
def a_profile_has_steps_ranks_and_a_folder(args: NeoXArgs) -> str | None:
    if not args.profile:
        return None
    if not args.log_dir:
        return "profile needs log_dir, where the traces are written"
    if args.profile_step_start >= args.profile_step_stop:
        return (
            f"profile_step_start {args.profile_step_start} is not below profile_step_stop {args.profile_step_stop}, "
            f"the first iteration that is not in the trace"
        )
    outside = [rank for rank in args.profile_ranks if not 0 <= rank < args.global_num_gpus]
    return f"profile_ranks: {outside} of {args.global_num_gpus} ranks do not exist" if outside else None


# --- checkpoints


@_rule(*_TRAIN)
def start_is_named(args: NeoXArgs) -> str | None:
    if args.load and args.from_scratch:
        return "load and from_scratch exclude each other; keep the one you mean"
    if args.load or args.from_scratch:
        return None
    return (
        "nothing to start from: give load (a checkpoint folder) or from_scratch: true. There is no silent random start"
    )


@_rule("eval", "generate")
def weights_are_named(args: NeoXArgs) -> str | None:
    return None if args.load else "nothing to evaluate: give load, the folder of a checkpoint"


@_rule(*_TRAIN)
def saving_has_a_rhythm(args: NeoXArgs) -> str | None:
    if not args.save or args.checkpoint_factor or args.extra_save_iters:
        return None
    return "save is given without checkpoint_factor or extra_save_iters: nothing would say when to save"


@_warning(*_TRAIN)
def nothing_is_saved(args: NeoXArgs) -> str | None:
    if args.save:
        return None
    return "save is not given: this run leaves no checkpoint" + (
        ", async_save has no effect" if args.async_save else ""
    )


@_rule(*_TRAIN)
def iteration_needs_load(args: NeoXArgs) -> str | None:
    if args.iteration is None or args.load:
        return None
    return f"iteration {args.iteration} names a checkpoint, but load, its folder, is not given"


# --- things that are right but surprise


@_warning(*_ALL)
def rope_scaling_is_forgotten(args: NeoXArgs) -> str | None:
    if args.rope_scaling or args.max_position_embeddings <= 8192 or args.rotary_emb_base != 500000:
        return None
    return (
        "rope_scaling is absent, but the theta and context are those of Llama-3.1, which scales its frequencies; "
        "without it 35 of 64 frequencies differ at every length"
    )


@_warning(*_ALL)
def attention_config_chooses_nothing(args: NeoXArgs) -> str | None:
    if args.attention_config is None:
        return None
    return (
        "attention_config has no effect: every layer runs scaled_dot_product_attention, flash where the device has it"
    )


@_warning(*_ALL)
def overlap_is_off(args: NeoXArgs) -> str | None:
    if not args.zero_optimization.overlap_comm:
        return None
    return "zero_optimization.overlap_comm has no effect: the pipeline engine turns overlapping off"


@_warning(*_ALL)
def merge_file_is_unused(args: NeoXArgs) -> str | None:
    return "merge_file has no effect: no supported tokenizer has one" if args.merge_file else None


def run(args: NeoXArgs, task: Task) -> None:
    """Raise one ConfigError that names every broken rule."""
    found = problems(args, task)
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        raise ConfigError(f"{len(found)} things are wrong:\n" + "\n".join(f"  - {text}" for text in found))
