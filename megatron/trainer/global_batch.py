"""A run that continues with a different number of data-parallel replicas keeps its global batch.

Micro-batch and accumulation describe one replica, so that with a node missing the same file would mean a different
batch, a different number of steps and a different learning rate for each sample. The checkpoint stores the batch; its
split follows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.start import Start
from megatron.common.errors import ConfigError
from megatron.neox_arguments import NeoXArgs

logger = logging.getLogger(__name__)


def keep_global_batch(args: NeoXArgs, start: Start) -> NeoXArgs:
    """The configuration with the accumulation that makes the saved run's global batch, for a run that continues.

    A configuration that asks for a different batch, by `train_batch_size` or by a changed accumulation, gets it.
    ConfigError, the same on all ranks, if the batch cannot be split over these replicas.
    """
    if start.checkpoint is None or start.restored == "weights":
        return args
    provenance = start.checkpoint.provenance
    saved = saved_batch_size(provenance)
    before, now = provenance.get("config", {}), args.merged
    asked = now.get("train_batch_size") is not None
    asked |= now.get("gradient_accumulation_steps") != before.get("gradient_accumulation_steps")
    if saved is None or saved == args.train_batch_size or asked:
        return args
    micro, replicas = args.train_micro_batch_size_per_gpu, args.data_parallel_size
    steps, rest = divmod(saved, micro * replicas)
    if rest:
        fitting = [n for n in range(1, 2 * replicas + 1) if saved % (micro * n) == 0]
        raise ConfigError(
            f"{start.checkpoint.folder} was saved with a global batch of {saved} sequences, which is not a multiple of "
            f"micro-batch {micro} x data_parallel_size {replicas} = {micro * replicas}. Change the number of ranks, "
            f"pipe_parallel_size or model_parallel_size so that data_parallel_size is one of "
            f"{', '.join(map(str, fitting[-6:]))}, or change train_micro_batch_size_per_gpu; to continue with another "
            "batch, set train_batch_size"
        )
    stages, virtual = args.pipe_parallel_size, args.virtual_pipe_parallel_size
    if virtual > 1 and steps % stages:
        fitting = [n for n in range(1, 2 * replicas + 1) if saved % (micro * n * stages) == 0]
        raise ConfigError(
            f"{start.checkpoint.folder} was saved with a global batch of {saved} sequences, which makes accumulation "
            f"{steps} of micro-batch {micro} x data_parallel_size {replicas}; with virtual_pipe_parallel_size "
            f"{virtual} it must be a multiple of pipe_parallel_size {stages}. Change the number of ranks so that "
            f"data_parallel_size is one of {', '.join(map(str, fitting[-6:])) or 'others'}, change "
            f"train_micro_batch_size_per_gpu, or leave virtual_pipe_parallel_size out"
        )
    logger.info(
        f"global batch {saved} as before: micro-batch {micro} x accumulation {steps} x data parallel {replicas} (the "
        f"configuration's accumulation {args.gradient_accumulation_steps} would make it {args.train_batch_size})"
    )
    return args.model_copy(update={"train_batch_size": saved, "gradient_accumulation_steps": steps})


def saved_batch_size(provenance: Mapping[str, Any]) -> int | None:
    """Sequences in a step of the run that saved a checkpoint; None if its manifest does not contain it.

    Older manifests contain the keys that determined it, and the layout.
    """
    config = provenance.get("config", {})
    found = provenance.get("train_batch_size") or config.get("train_batch_size")
    micro, replicas = config.get("train_micro_batch_size_per_gpu"), provenance.get("layout", {}).get("dp")
    if found is None and micro is not None and replicas is not None:
        found = micro * (config.get("gradient_accumulation_steps") or 1) * replicas
    return found
