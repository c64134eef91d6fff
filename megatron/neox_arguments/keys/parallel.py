"""Keys for the number of ranks, what each holds and how they are started, and their rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron.common.errors import ConfigError
from megatron.neox_arguments.keys.fields import Keys, derived, key
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class ParallelKeys(Keys):
    model_parallel_size: int = key(1, "Number of tensor-parallel ranks; each group of them stays within a node.", gt=0)
    sequence_parallel: bool = key(
        False,
        "Split the sequence over the tensor-parallel ranks between layers: less memory for activations, at the cost of "
        "two more gathers or reduce-scatters per layer. model_parallel_size must divide seq_length.",
    )
    pipe_parallel_size: int = key(1, "Number of pipeline stages; GPT-NeoX's 0 (sequential model) is taken as 1.", ge=0)
    pipe_partition_method: str = key(
        "type:transformer|mlp",
        "How layers are assigned to stages. `type:REGEX` balances the number of layers whose class name matches, "
        "`parameters` the number of parameters, `uniform` the number of layers.",
        pattern=r"^(uniform|parameters|type:.+)$",
    )
    global_num_gpus: int = derived(
        "the launcher's world size, else num_nodes x num_gpus, else pipe_parallel_size x model_parallel_size",
        "Total number of ranks; data_parallel_size is this / (pipe_parallel_size x model_parallel_size).",
        gt=0,
    )
    num_nodes: int = key(1, "Number of nodes; GPT-NeoX's -1 is taken as 1.", ge=-1)
    num_gpus: int | None = key(None, "Ranks per node: one per GPU, or gloo processes on a node without GPUs.", gt=0)
    distributed_backend: Literal["nccl", "gloo"] = key(
        "nccl", "Communication library: nccl (RCCL on ROCm) for GPUs, gloo for CPUs."
    )
    distributed_timeout_minutes: int = key(
        30, "Minutes after which an unfinished collective ends the run: a rank has died or hangs.", ours=True, gt=0
    )
    device: Literal["cuda", "cpu"] = derived(
        "cuda with nccl, cpu with gloo", "Device of the tensors; ROCm GPUs are called cuda, too.", ours=True
    )
    launcher: Literal["auto", "fork", "torchrun", "slurm", "pdsh", "openmpi", "mvapich", "mpich", "impi", "jsrun"] = (
        key(
            "auto",
            "How deepy.py starts the ranks. fork: one process imports the libraries, then forks (CPUs only); torchrun: "
            "each rank imports them itself (required for GPUs); slurm: one srun over the nodes of the allocation; "
            "auto: slurm inside an allocation, else fork on CPUs and torchrun on GPUs. GPT-NeoX's other launchers are "
            "taken as auto.",
        )
    )

    @property
    def data_parallel_size(self) -> int:
        return self.global_num_gpus // (self.pipe_parallel_size * self.model_parallel_size)


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("pipe_parallel_size",))
def sequential_model_is_one_stage(args: ParallelKeys, world_size: int | None) -> Derived:
    if args.pipe_parallel_size != 0:
        return Derived({})
    note = "pipe_parallel_size 0 (GPT-NeoX's sequential model) is taken as 1: one pipeline stage"
    return Derived({"pipe_parallel_size": 1}, (note,))


@registry.derivation(*ALL_TASKS, fills=("sequence_parallel",))
def one_tensor_rank_holds_the_whole_sequence(args: ParallelKeys, world_size: int | None) -> Derived:
    if not args.sequence_parallel or args.model_parallel_size > 1:
        return Derived({})
    note = "sequence_parallel has no effect with model_parallel_size 1: one rank holds the whole sequence"
    return Derived({"sequence_parallel": False}, (note,))


@registry.derivation(*ALL_TASKS, fills=("launcher",))
def launchers_of_gpt_neox(args: ParallelKeys, world_size: int | None) -> Derived:
    if args.launcher in ("auto", "fork", "torchrun", "slurm"):
        return Derived({})
    note = (
        f"launcher {args.launcher} is taken as auto: in a Slurm allocation deepy.py itself starts all nodes with "
        f"srun, elsewhere the ranks of this machine"
    )
    return Derived({"launcher": "auto"}, (note,))


@registry.derivation(*ALL_TASKS, fills=("device",))
def device_of_the_backend(args: ParallelKeys, world_size: int | None) -> Derived:
    return Derived({"device": args.device or ("cpu" if args.distributed_backend == "gloo" else "cuda")})


@registry.derivation(*ALL_TASKS, fills=("global_num_gpus", "num_nodes"))
def number_of_ranks(args: ParallelKeys, world_size: int | None) -> Derived:
    """What the launcher started, else what the configuration asks for, else the smallest number that works."""
    nodes, pipe = max(1, args.num_nodes), args.pipe_parallel_size
    asked = args.global_num_gpus or (nodes * args.num_gpus if args.num_gpus else None)
    if args.global_num_gpus and args.num_gpus and args.global_num_gpus != nodes * args.num_gpus:
        raise ConfigError(
            f"global_num_gpus {args.global_num_gpus} is not num_nodes {nodes} x num_gpus {args.num_gpus}; "
            f"give one of them"
        )
    if world_size and asked and world_size != asked:
        raise ConfigError(
            f"{world_size} ranks were started, but global_num_gpus (or num_nodes x num_gpus) asks for {asked}; "
            f"start {asked} ranks or change the key"
        )
    per_copy = pipe * args.model_parallel_size
    total = world_size or asked or per_copy
    if total % per_copy:
        raise ConfigError(
            f"{total} ranks cannot be divided into pipe_parallel_size {pipe} x model_parallel_size "
            f"{args.model_parallel_size} = {per_copy}; use a multiple of {per_copy} ranks"
        )
    return Derived({"global_num_gpus": total, "num_nodes": 1 if args.num_nodes == -1 else args.num_nodes})


# --- rules


@registry.rule(*ALL_TASKS)
def tensors_divide_by_tensor_parallelism(args: AllKeys) -> str | None:
    if args.num_attention_heads % args.num_kv_heads or args.hidden_size % args.num_attention_heads:
        return None  # the rules of the model report it
    if not args.vocabulary_is_known:
        return None  # checked where the tokenizer is available
    try:
        args.shape.check_tensor_parallel(args.model_parallel_size)
    except ValueError as error:
        return str(error)
    return None


# Evaluation pads its sequences, and generation does not use sequence parallelism.
@registry.rule("train")
def sequence_divides_by_tensor_parallelism(args: AllKeys) -> str | None:
    ranks = args.model_parallel_size
    if not args.sequence_parallel or args.seq_length is None or args.seq_length % ranks == 0:
        return None
    below = args.seq_length // ranks * ranks
    above = below + ranks
    legal = above if above <= args.max_position_embeddings or not below else below
    return (
        f"seq_length {args.seq_length} cannot be split into {ranks} equal slices, as sequence_parallel with "
        f"model_parallel_size {ranks} requires; write seq_length: {legal}"
    )


@registry.rule(*ALL_TASKS)
def every_stage_has_a_layer(args: AllKeys) -> str | None:
    if args.pipe_parallel_size <= args.num_layers:
        return None
    return (
        f"pipe_parallel_size {args.pipe_parallel_size} is more than num_layers {args.num_layers}: a stage would have "
        f"no layer; use at most {args.num_layers}"
    )


@registry.warning("train", "eval")
def stages_are_uneven(args: AllKeys) -> str | None:
    """Legal, as in GPT-NeoX, but the step waits for the longest stage."""
    layers, stages, virtual = args.num_layers, args.pipe_parallel_size, args.virtual_pipe_parallel_size
    runs = stages * virtual
    if layers % runs == 0:
        return None
    named, kind = f"{stages} pipeline stages", "stages"
    if virtual > 1:
        named, kind = f"{stages} x {virtual} virtual stages", "virtual stages"
    return (
        f"{layers} layers on {named}: some {kind} hold {-(-layers // runs)} layers, some {layers // runs}, and the "
        f"step waits for the longest"
    )


@registry.rule(*ALL_TASKS)
def device_fits_backend(args: ParallelKeys) -> str | None:
    if args.distributed_backend == "nccl" and args.device == "cpu":
        return "distributed_backend nccl needs GPUs, but device is cpu; write distributed_backend: gloo"
    return None


@registry.rule(*ALL_TASKS)
def nodes_hold_whole_numbers_of_ranks(args: ParallelKeys) -> str | None:
    if args.global_num_gpus % max(1, args.num_nodes) == 0:
        return None
    return f"{args.global_num_gpus} ranks cannot be spread evenly over num_nodes {args.num_nodes}"
