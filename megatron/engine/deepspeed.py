"""The DeepSpeed pipeline engine around the model, and what it really has: printed, and checked against the request.

GPT-NeoX passes DeepSpeed only the values that differ from its own defaults, so that gradient clipping was off in
nearly every shipped configuration. Here the engine is read back.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from megatron.core import parallel_state

from megatron.engine.deepspeed_files import SafeCheckpointEngine
from megatron.engine.deepspeed_hooks import spread_what_is_not_finite
from megatron.engine.optimizer import build_optimizer
from megatron.model.parallel import TensorParallel
from megatron.model.pipeline import PARAMETER_DTYPES, LlamaPipelineModule
from megatron.neox_arguments import NeoXArgs
from megatron.ops import configure
from megatron.parallel.process_groups import set_timeouts

EXPECTED_OPTIMIZER = {
    "fp32": "DeepSpeedZeroOptimizer",
    "bfloat16": "BF16_Optimizer",  # the one that keeps fp32 masters and accumulates in fp32
}


class EngineMismatchError(RuntimeError):
    """The engine does not have what the configuration asks for."""


def build_model(
    args: NeoXArgs, device: torch.device, log: Callable[[str], None] = lambda line: None
) -> LlamaPipelineModule:
    """This rank's stage, uninitialised, on `device`. Needs megatron-core's parallel state.

    Chooses the fused operations' implementation for the process; raises KernelsUnavailable where that is impossible.
    """
    log(configure(args.kernels, device))
    tp = TensorParallel(parallel_state.get_tensor_model_parallel_group(), PARAMETER_DTYPES[args.precision])
    return LlamaPipelineModule(args, tp, device)


def build_engine(args: NeoXArgs, model: LlamaPipelineModule, log: Callable[[str], None]) -> PipelineEngine:
    """DeepSpeed's pipeline engine with ZeRO-1; its fp32 masters are copies of the model's present weights."""
    engine = _initialize(model, args.deepspeed_config, args.distributed_timeout_minutes, build_optimizer(model, args))
    _check(engine, args)
    spread_what_is_not_finite(engine)
    for line in describe(engine, args):
        log(line)
    return engine


def build_inference_engine(args: NeoXArgs, model: LlamaPipelineModule) -> PipelineEngine:
    """The same pipeline without optimizer, for evaluation and generation; `model` holds its weights already."""
    config = {
        "train_micro_batch_size_per_gpu": args.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": args.precision == "bfloat16"},
    }
    return _initialize(model, config, args.distributed_timeout_minutes)


def _initialize(
    model: LlamaPipelineModule,
    config: dict[str, Any],
    timeout_minutes: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> PipelineEngine:
    """`deepspeed.initialize` without its chatter: memory readings go to stdout, everything else to its logger."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    set_timeouts(timeout_minutes)
    engine.checkpoint_engine = SafeCheckpointEngine()  # DeepSpeed's own opens files with weights_only=False
    return engine


def describe(engine: PipelineEngine, args: NeoXArgs) -> list[str]:
    """What the engine reports of itself, for the start of the log."""
    return [
        f"engine: {type(engine.optimizer).__name__} over {type(_inner(engine)).__name__}, ZeRO stage "
        f"{engine.zero_optimization_stage()}, weights {args.precision}, gradients accumulated in fp32 and reduced in "
        f"{_name(engine.communication_data_type)}, clipping at {engine.gradient_clipping():g}",
        f"batch: {engine.train_batch_size()} = micro-batch {engine.train_micro_batch_size_per_gpu()} x accumulation "
        f"{engine.gradient_accumulation_steps()} x data parallel {engine.grid.data_parallel_size}",
        "stages: "
        + ", ".join(
            f"{stage}: layers {layers.start}-{layers.stop - 1}"
            for stage, layers in ((s, engine.module.stage_layers(s)) for s in range(engine.num_stages))
        ),
    ]


def _inner(engine: PipelineEngine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def _check(engine: PipelineEngine, args: NeoXArgs) -> None:
    expected = EXPECTED_OPTIMIZER[args.precision]
    found = {
        "optimizer": (type(engine.optimizer).__name__, expected),
        "ZeRO stage": (engine.zero_optimization_stage(), 1),
        "dtype of the gradients' reduction": (_name(engine.communication_data_type), "fp32"),
        "gradient clipping": (engine.gradient_clipping(), args.gradient_clipping),
        "train_batch_size": (engine.train_batch_size(), args.train_batch_size),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), args.gradient_accumulation_steps),
    }
    wrong = [f"{name} is {has}, asked for {want}" for name, (has, want) in found.items() if has != want]
    if wrong:
        raise EngineMismatchError("the DeepSpeed engine is not what was configured: " + "; ".join(wrong))
