"""Keys that say how many ranks there are, what each holds, and how they are started."""

from __future__ import annotations

from typing import Literal

from megatron.neox_arguments.keys.fields import Keys, derived, key


class ParallelKeys(Keys):
    model_parallel_size: int = key(1, "Tensor-parallel ranks; a group never leaves a node.", gt=0)
    pipe_parallel_size: int = key(1, "Pipeline stages. GPT-NeoX's 0 (sequential model) is taken as 1.", ge=0)
    pipe_partition_method: str = key(
        "type:transformer|mlp",
        "How layers are dealt to stages: `type:REGEX` balances layers whose class matches, `parameters` their "
        "parameters, `uniform` their number.",
        pattern=r"^(uniform|parameters|type:.+)$",
    )
    global_num_gpus: int = derived(
        "the launcher's world size, else num_nodes x num_gpus, else pipe_parallel_size x model_parallel_size",
        "Ranks in all; data_parallel_size is what is left after pipeline and tensor parallelism.",
        gt=0,
    )
    num_nodes: int = key(1, "Machines.", ge=-1)
    num_gpus: int | None = key(None, "Ranks on each machine; on a CPU machine, gloo processes.", gt=0)
    distributed_backend: Literal["nccl", "gloo"] = key("nccl", "nccl (RCCL on ROCm) for GPUs, gloo for CPUs.")
    distributed_timeout_minutes: int = key(
        30, "A collective that takes longer ends the run: some rank has died or hangs.", ours=True, gt=0
    )
    device: Literal["cuda", "cpu"] = derived(
        "cuda with nccl, cpu with gloo", "Where tensors live; ROCm's devices are called cuda.", ours=True
    )
    launcher: Literal["auto", "fork", "torchrun", "slurm"] = key(
        "auto",
        "How deepy.py starts ranks. fork: one process imports, then forks (CPU); torchrun: each rank imports for "
        "itself (needed for GPUs); slurm: one srun over the nodes of the allocation; auto: slurm inside of an "
        "allocation, else fork on cpu, torchrun on cuda.",
    )
