"""DeepSpeed's pipeline engine with ZeRO-1 behind the project's interface, checked against the configuration.

GPT-NeoX passes DeepSpeed only the values that differ from GPT-NeoX's own defaults, which left gradient clipping off in
nearly every shipped configuration. Here the settings are read back from the engine.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from megatron.common.errors import UserError
from megatron.engine import deepspeed_files
from megatron.engine.batches import (
    MicroBatch,
    ScoreBatch,
    StepBatch,
    loss_targets,
    model_inputs,
    padded,
    sequence,
)
from megatron.engine.deepspeed_hooks import (
    free_logits_after_backward,
    run_instructions_inside,
    run_optimizer_after,
    take_norm_of_all_groups,
)
from megatron.engine.deepspeed_loss_scale import LossScale
from megatron.engine.deepspeed_module import LlamaPipelineModule
from megatron.engine.deepspeed_optimizer import load_shards, optimizer_shards
from megatron.engine.deepspeed_scores import pipeline_scores
from megatron.engine.nonfinite import propagate
from megatron.engine.operations import choose_operations
from megatron.engine.optimizer import (
    REPLICATED_GROUPS,
    adapter_and_slice_lines,
    build_optimizer,
    group_names,
    parameter_groups,
)
from megatron.engine.optimizer_shards import OptimizerShard, ReadShard
from megatron.engine.protocol import Around, Counters, StepResult
from megatron.model.cache import CachedTokens, run_cached
from megatron.model.features import PooledTokens, run_pooled
from megatron.model.sequence_parallel import sum_over_slices
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.deepspeed_config import pipeline_messages
from megatron.parallel.place import Place
from megatron.parallel.process_groups import ModelGroups, set_timeouts

EXPECTED_OPTIMIZER = {
    "fp32": "DeepSpeedZeroOptimizer",
    "bfloat16": "BF16_Optimizer",  # keeps fp32 masters and accumulates in fp32
    "fp16": "DeepSpeedZeroOptimizer",  # does the same with grad_accum_dtype
}


class EngineMismatchError(RuntimeError):
    """The engine's settings differ from the configuration."""


class DeepSpeedEngine:
    """`megatron.engine.protocol.Engine` on DeepSpeed's PipelineEngine."""

    def __init__(self, args: NeoXArgs, place: Place, module: LlamaPipelineModule, engine: PipelineEngine) -> None:
        self.args, self.place, self.module, self.pipeline_engine = args, place, module, engine
        grid = engine.grid
        self.groups = ModelGroups(
            tensor=module.tensor_parallel.group,
            data=grid.get_data_parallel_group(),
            pipe=grid.get_pipe_parallel_group(),
            tied=module.tied_group(),
        )
        self._around: Around = contextlib.nullcontext
        self.check_messages()
        self._loss_scale: LossScale | None = None

    @classmethod
    def for_training(cls, args: NeoXArgs, place: Place, around: Around) -> DeepSpeedEngine:
        module = _module(args, place)
        rows = {id(parameter): row for parameter, row in module.parameter_rows()}
        groups = parameter_groups(module.parameters(), rows, args.weight_decay)
        optimizer = build_optimizer(groups, args)
        engine = cls(args, place, module, _initialize(module, args, args.deepspeed_config, optimizer))
        engine.check()
        if args.precision == "fp16":
            engine._loss_scale = LossScale(engine.pipeline_engine.optimizer)
        run_optimizer_after(engine.pipeline_engine, engine.complete_gradients)
        free_logits_after_backward(engine.pipeline_engine)
        take_norm_of_all_groups(engine.pipeline_engine.optimizer, group_names(args.trained_shape))
        engine.run_inside(around)
        return engine

    @classmethod
    def for_inference(cls, args: NeoXArgs, place: Place, around: Around) -> DeepSpeedEngine:
        module = _module(args, place)
        config = {
            "train_micro_batch_size_per_gpu": args.train_micro_batch_size_per_gpu or 1,  # generation does not use it
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": args.precision == "bfloat16"},
            **pipeline_messages(args),
            "fp16": {"enabled": args.precision == "fp16"},
        }
        engine = cls(args, place, module, _initialize(module, args, config))
        engine.run_inside(around)
        return engine

    def run_inside(self, around: Around) -> None:
        self._around = around
        run_instructions_inside(self.pipeline_engine, around)

    def describe(self) -> list[str]:
        engine = self.pipeline_engine
        lines = [
            f"engine: {type(engine.optimizer).__name__} over {type(engine.optimizer.optimizer).__name__}, ZeRO stage "
            f"{engine.zero_optimization_stage()}, weights {self.args.precision}, gradients accumulated in fp32 and "
            f"reduced in {_name(engine.communication_data_type)}, clipping at {engine.gradient_clipping():g}",
            f"batch: {engine.train_batch_size()} = micro-batch {engine.train_micro_batch_size_per_gpu()} x "
            f"accumulation {engine.gradient_accumulation_steps()} x data parallel {engine.grid.data_parallel_size}",
            "stages: "
            + ", ".join(
                f"{stage}: layers {layers.start}-{layers.stop - 1}"
                for stage, layers in ((s, self.stage_layers(s)) for s in range(self.place.pp))
            ),
        ]
        return lines + adapter_and_slice_lines(self.args)

    # --- the stage

    def numbered_layers(self) -> Iterator[tuple[int, nn.Module]]:
        return self.module.numbered_layers()

    def tied_copies(self) -> Iterator[tuple[int, nn.Module]]:
        return self.module.tied_copies()

    def stage_layers(self, stage: int, virtual: int = 0) -> range:
        return self.module.stage_layers(stage, virtual)

    def initialize_weights(self) -> None:
        self.module.initialize_weights()
        self.weights_changed()

    def weights_changed(self) -> None:
        self.module.synchronize_tied()
        if self.pipeline_engine.optimizer is not None:
            self.pipeline_engine.optimizer.refresh_fp32_params()

    # --- steps

    def set_learning_rate(self, rate: float) -> None:
        for group in self.pipeline_engine.optimizer.param_groups:
            group["lr"] = rate

    def train_step(self, batch: StepBatch) -> StepResult:
        scale = None if self._loss_scale is None else self._loss_scale.scale
        mean_loss = self.pipeline_engine.train_batch(self._iterator(batch))
        with self._around("result"):  # here the host waits for the GPU to finish the step
            loss, grad_norm = float(mean_loss), float(self.pipeline_engine.get_global_grad_norm())
        total = float(self.pipeline_engine.total_loss) if self.place.last_stage else None
        replica_loss = None if total is None else total / batch.num_micro_batches
        overflow = self._loss_scale is not None and self._loss_scale.after_step(math.isfinite(loss))
        return StepResult(loss, grad_norm, self.pipeline_engine.was_step_applied(), replica_loss, overflow, scale)

    def evaluate(self, batch: StepBatch) -> float:
        if batch.micro_batches is not None:
            micro_batches = (self._fitting(micro_batch) for micro_batch in batch.micro_batches)
            batch = replace(batch, micro_batches=micro_batches)
        return float(self.pipeline_engine.eval_batch(self._iterator(batch), num_micro_batches=batch.num_micro_batches))

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor | None:
        given = {"tokens": tokens} if positions is None else {"tokens": tokens, "positions": positions}
        inputs = model_inputs(self._fitting(given))
        self.pipeline_engine.total_loss = None  # it would add these logits to the losses of a previous evaluation
        _, logits = self.pipeline_engine.eval_batch(
            iter([(inputs, tokens)]) if self.place.reads_data else None,
            return_logits=True,
            compute_loss=False,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=1,
        )
        self.pipeline_engine.total_loss = None
        return logits[:, : tokens.shape[1]] if self.place.last_stage else None

    def _fitting(self, micro_batch: MicroBatch) -> MicroBatch:
        """Pad the sequences to a length that the tensor-parallel ranks can divide."""
        return padded(micro_batch, self.module.tensor_parallel.padded_length(sequence(micro_batch).shape[1]))

    @torch.inference_mode()
    def forward_cached(self, inputs: Tensor, tokens: CachedTokens) -> Tensor:
        first = self.stage_layers(self.place.pp_rank).start
        with self._around("forward"):
            return run_cached(self.module.forward_funcs, first, self.args.num_layers, inputs, tokens)

    @torch.inference_mode()
    def forward_pooled(self, inputs: Tensor, work: PooledTokens) -> tuple[Tensor, dict[int, Tensor]]:
        first = self.stage_layers(self.place.pp_rank).start
        with self._around("forward"):
            return run_pooled(self.module.forward_funcs, first, self.args.num_layers, inputs, work)

    def token_scores(self, batches: Iterable[ScoreBatch] | None, num_micro_batches: int) -> list[Tensor] | None:
        scores = pipeline_scores(self.pipeline_engine, self.module, batches, num_micro_batches)
        return scores if self.place.last_stage else None

    @staticmethod
    def _iterator(batch: StepBatch) -> Iterator[Any] | None:
        """The data iterator for DeepSpeed: (inputs, targets) per micro-batch; None on stages that read no data."""
        if batch.micro_batches is None:
            return None
        return ((model_inputs(mb), loss_targets(mb, batch.weight)) for mb in batch.micro_batches)

    def complete_gradients(self) -> None:
        """Complete the reduced gradients before their norm is computed: sums over slices, and non-finite values."""
        gradients: dict[bool, list[Tensor]] = {True: [], False: []}
        for number, group in enumerate(self.pipeline_engine.optimizer.param_groups):
            gradients[group["name"] in REPLICATED_GROUPS] += reduced_gradients(self.pipeline_engine.optimizer, number)
        if self.module.tensor_parallel.sequence_parallel:
            sum_over_slices(gradients[True], self.groups.tensor)
        propagate(replicated=gradients[True], sharded=gradients[False])

    # --- checkpoints

    @property
    def counters(self) -> Counters:
        engine = self.pipeline_engine
        counters = Counters(engine.global_steps, engine.global_samples, engine.skipped_steps)
        if self._loss_scale is None:
            return counters
        return replace(counters, overflows=self._loss_scale.overflows, loss_scale=self._loss_scale.state)

    @counters.setter
    def counters(self, counters: Counters) -> None:
        engine = self.pipeline_engine
        engine.global_steps, engine.global_samples = counters.steps, counters.samples
        engine.skipped_steps = counters.skipped
        if self._loss_scale is not None:
            self._loss_scale.overflows = counters.overflows
            if counters.loss_scale is not None:
                self._loss_scale.state = counters.loss_scale

    def meta_content(self) -> dict[str, Any]:
        content = deepspeed_files.meta_content(self.pipeline_engine)
        if self._loss_scale is None:
            return content
        return content | {"overflow_steps": self._loss_scale.overflows, "loss_scale": asdict(self._loss_scale.state)}

    def optimizer_shards(self) -> list[OptimizerShard]:
        optimizer, place = self.pipeline_engine.optimizer, self.place
        return optimizer_shards(optimizer, self.numbered_layers(), self.tied_copies(), place.tp_rank)

    def load_shards(self, read: ReadShard) -> None:
        optimizer, place = self.pipeline_engine.optimizer, self.place
        load_shards(optimizer, self.numbered_layers(), self.tied_copies(), place.tp_rank, read)

    # --- read back

    def check_messages(self) -> None:
        """Raise EngineMismatchError if the engine would split the slices of sequence parallelism again.

        By default DeepSpeed partitions every message between stages over the tensor-parallel ranks, assuming that all
        hold the same tensor, and gathers the parts on arrival. With sequence parallelism the parts would be of
        different tensors: the run would silently train a different model.
        """
        engine = self.pipeline_engine
        divided = engine.is_pipe_partitioned or engine.is_grad_partitioned
        if self.module.tensor_parallel.sequence_parallel and divided:
            raise EngineMismatchError(
                "the DeepSpeed engine divides messages between stages over tensor-parallel ranks (pipe_partitioned "
                f"{engine.is_pipe_partitioned}, grad_partitioned {engine.is_grad_partitioned}), but with "
                "sequence_parallel they are slices already; both must be false"
            )

    def check(self) -> None:
        """Raise EngineMismatchError unless the engine's settings match the configuration."""
        engine, args = self.pipeline_engine, self.args
        found = {
            "optimizer": (type(engine.optimizer).__name__, EXPECTED_OPTIMIZER[args.precision]),
            "ZeRO stage": (engine.zero_optimization_stage(), 1),
            "dtype of the gradients' reduction": (_name(engine.communication_data_type), "fp32"),
            "gradient clipping": (engine.gradient_clipping(), args.gradient_clipping),
            "train_batch_size": (engine.train_batch_size(), args.train_batch_size),
            "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), args.gradient_accumulation_steps),
        }
        wrong = [f"{name} is {has}, asked for {want}" for name, (has, want) in found.items() if has != want]
        if wrong:
            raise EngineMismatchError("the DeepSpeed engine is not what was configured: " + "; ".join(wrong))


def _module(args: NeoXArgs, place: Place) -> LlamaPipelineModule:
    choose_operations(args, place)
    return LlamaPipelineModule(args, place)


def _initialize(
    module: LlamaPipelineModule,
    args: NeoXArgs,
    config: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> PipelineEngine:
    """`deepspeed.initialize` without its messages: it prints memory readings to stdout and logs everything else.

    Raises UserError if fp16 is configured and DeepSpeed does not support it on this device.
    """
    if args.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            "precision fp16: DeepSpeed trains in fp16 on GPUs, and does not support it on this device; "
            "give --precision bfloat16 or fp32, with --fp16 null where a file enables fp16"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    set_timeouts(args.distributed_timeout_minutes)
    engine.checkpoint_engine = deepspeed_files.SafeCheckpointEngine()  # DeepSpeed's opens files with weights_only=False
    return engine


def reduced_gradients(optimizer: Any, group: int) -> list[Tensor]:
    """This rank's reduced gradients of a parameter group, as the optimizer will use them."""
    if hasattr(optimizer, "averaged_gradients"):  # DeepSpeedZeroOptimizer
        return list(optimizer.averaged_gradients[group] or [])
    if hasattr(optimizer, "fp32_groups_gradients"):  # BF16_Optimizer
        return list(optimizer.fp32_groups_gradients[group])
    raise RuntimeError(f"{type(optimizer).__name__} keeps its gradients in a place unknown to this project")


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
