"""megatron-core's pipeline schedules, gradient buckets and distributed optimizer behind the project's interface.

Process groups, messages between stages, partition, parameter groups and the decision whether to apply a step are this
project's; megatron-core's global state is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor, nn

from megatron import layout
from megatron.engine.batches import MicroBatch, ScoreBatch, StepBatch, loss_targets
from megatron.engine.cuda_names import on_device, schedule_on
from megatron.engine.mcore_batches import PipelineBatch, on_all_stages
from megatron.engine.mcore_chunks import ChunkedStage
from megatron.engine.mcore_groups import EngineGroups
from megatron.engine.mcore_links import LinkP2P
from megatron.engine.mcore_optimizer import GuardedOptimizer, HeldParameter, build_distributed_optimizer
from megatron.engine.mcore_phases import PhaseTimers
from megatron.engine.mcore_settings import bucket_config, description, transformer_config
from megatron.engine.nonfinite import poisoned
from megatron.engine.operations import choose_operations
from megatron.engine.optimizer import mark_sharded
from megatron.engine.optimizer_shards import OptimizerShard, ReadShard
from megatron.engine.protocol import Around, Counters, StepResult, no_phases
from megatron.model.cache import CachedTokens, run_cached
from megatron.model.features import PooledTokens, run_pooled
from megatron.model.initialize import initialize_layers
from megatron.model.lora import freeze_base
from megatron.model.parallel import TensorParallel
from megatron.model.pipeline import PARAMETER_DTYPES, training_loss
from megatron.model.scores import TokenScores
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place

OnOutput = Callable[[Tensor, MicroBatch], Tensor]
"""(logits of the last virtual stage, micro-batch) -> loss, scores or logits to collect."""


class MegatronEngine:
    """`megatron.engine.protocol.Engine` on megatron-core."""

    def __init__(self, args: NeoXArgs, place: Place, around: Around, virtual: int) -> None:
        choose_operations(args, place)
        self.args, self.place, self._around = args, place, around
        tied, timeout = args.shape.tied, args.distributed_timeout_minutes
        self._groups = EngineGroups.make(place, tied, virtual > 1, timeout)
        self.groups = self._groups.as_model_groups()
        self.tensor_parallel = TensorParallel(
            self.groups.tensor, PARAMETER_DTYPES[args.precision], args.sequence_parallel
        )
        self.config = transformer_config(args, place, virtual)
        self.config.timers = PhaseTimers(around)
        self.stage = ChunkedStage(args, place, self.tensor_parallel, self.config, virtual)
        if args.lora is not None:
            for chunk in self.stage.chunks:
                freeze_base(chunk.named_parameters())
        self._held = list(self._hold())
        mark_sharded((one.parameter, one.row) for one in self._held)
        self._communicator = LinkP2P(self.groups.pipe, self.config, self._groups.links, place.device, around)
        self._mcore_groups = self._groups.as_mcore()
        self._loss = training_loss(args, self.tensor_parallel)
        self.model: Sequence[nn.Module] = self.stage.chunks
        self._optimizer: GuardedOptimizer | None = None
        self.counters = Counters()

    @classmethod
    def for_training(cls, args: NeoXArgs, place: Place, around: Around = no_phases) -> MegatronEngine:
        engine = cls(args, place, around, args.virtual_pipe_parallel_size)
        engine._prepare_training()
        return engine

    @classmethod
    def for_inference(cls, args: NeoXArgs, place: Place, around: Around = no_phases) -> MegatronEngine:
        """Without virtual stages, which only help training: every rank has one run of layers."""
        return cls(args, place, around, virtual=1)

    @staticmethod
    def stage_of(args: NeoXArgs, place: Place) -> ChunkedStage:
        """Only this rank's part of the model."""
        virtual = args.virtual_pipe_parallel_size
        groups = EngineGroups.make(place, args.shape.tied, virtual > 1, args.distributed_timeout_minutes)
        tensor_parallel = TensorParallel(groups.tensor, PARAMETER_DTYPES[args.precision], args.sequence_parallel)
        return ChunkedStage(args, place, tensor_parallel, transformer_config(args, place, virtual), virtual)

    def _hold(self) -> Iterator[HeldParameter]:
        """Every parameter of this rank."""
        for copy, layers in ((False, self.stage.numbered_layers()), (True, self.stage.tied_copies())):
            for number, layer in layers:
                for name, parameter in layer.named_parameters():
                    yield HeldParameter(
                        number, name, parameter, layout.row_of(number, name, self.args.whole_shape), copy
                    )

    def _prepare_training(self) -> None:
        """Build gradient buckets and optimizer, and configure the schedule to use them."""
        args, config = self.args, self.config
        trained = [one for one in self._held if one.parameter.requires_grad]
        for one in trained:
            # For megatron-core: sum this gradient over the slices of the sequence; add its tied copy's gradient.
            one.parameter.sequence_parallel = one.row.replicated and args.sequence_parallel  # type: ignore[attr-defined]
            one.parameter.shared_embedding = (  # type: ignore[attr-defined]
                args.shape.tied and self.place.pp > 1 and one.layer == layout.EMBEDDING_INDEX
            )
        buckets = bucket_config(args)
        with on_device(self.place.device):
            wrapped = [
                DistributedDataParallel(
                    config, buckets, chunk, disable_bucketing=number > 0, pg_collection=self._mcore_groups
                )
                for number, chunk in enumerate(self.stage.chunks)
            ]
            optimizer = build_distributed_optimizer(args, wrapped, trained, self.groups.data)
        self.model = self._wrapped = wrapped
        self.stage.chunks[-1].before_tied_head = self._finish_gather_of_tied_copy
        self._optimizer = GuardedOptimizer(args, self.place, optimizer, trained)
        if args.overlap_grad_reduce:
            syncs = [chunk.no_sync for chunk in wrapped]
            config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        config.finalize_model_grads_func = finalize_model_grads

    def describe(self) -> list[str]:
        return description(self.args, self.place, self.stage.virtual, self.stage_layers)

    # --- the stage

    def numbered_layers(self) -> Iterator[tuple[int, nn.Module]]:
        self._finish_gathers()
        return self.stage.numbered_layers()

    def tied_copies(self) -> Iterator[tuple[int, nn.Module]]:
        self._finish_gathers()
        return self.stage.tied_copies()

    def stage_layers(self, stage: int, virtual: int = 0) -> range:
        return self.stage.stage_layers(stage, virtual)

    def initialize_weights(self) -> None:
        initialize_layers(self.numbered_layers(), self.args, self.place.tp, self.place.tp_rank)
        self.weights_changed()

    @torch.no_grad()
    def weights_changed(self) -> None:
        if self.groups.tied is not None:
            for one in self._held:
                if one.layer == layout.EMBEDDING_INDEX:
                    dist.broadcast(one.parameter.data, group=self.groups.tied, group_src=0)
        if self._optimizer is not None:
            with on_device(self.place.device):
                self._optimizer.renew_masters()

    # --- steps

    def set_learning_rate(self, rate: float) -> None:
        self._trained().set_learning_rate(rate)

    def train_step(self, batch: StepBatch) -> StepResult:
        optimizer, count = self._trained(), batch.num_micro_batches
        everywhere = self._on_all_stages(batch.micro_batches, count)
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()

        def learn(logits: Tensor, micro_batch: MicroBatch) -> Tensor:
            return poisoned(self._loss(logits, loss_targets(micro_batch, batch.weight.to(logits.device))))

        losses = self._run(everywhere, learn, train=True)
        replica_loss = torch.stack(losses).sum() / count if losses else None
        with self._around("optimizer"), on_device(self.place.device):
            loss, norm, applied = optimizer.step(self._share_of_mean(replica_loss))
            if applied:
                self._start_gathers()
        counters = self.counters
        self.counters = replace(
            counters,
            steps=counters.steps + 1,
            samples=counters.samples + self.args.train_batch_size,
            skipped=counters.skipped + (not applied),
        )
        return StepResult(loss, norm, applied, None if replica_loss is None else float(replica_loss))

    def evaluate(self, batch: StepBatch) -> float:
        everywhere = self._on_all_stages(batch.micro_batches, batch.num_micro_batches)

        def judge(logits: Tensor, micro_batch: MicroBatch) -> Tensor:
            return self._loss(logits, loss_targets(micro_batch, batch.weight.to(logits.device)))

        losses = self._run(everywhere, judge)
        mean = self._share_of_mean(torch.stack(losses).sum() / batch.num_micro_batches if losses else None)
        dist.all_reduce(mean)
        return float(mean)

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor | None:
        given = {"tokens": tokens} if positions is None else {"tokens": tokens, "positions": positions}
        found = self._run(self._on_all_stages([given], 1), lambda logits, _: logits)
        return found[0][:, : tokens.shape[1]] if self.place.last_stage else None

    def token_scores(self, batches: Iterable[ScoreBatch] | None, num_micro_batches: int) -> list[Tensor] | None:
        score = TokenScores(self.groups.tensor, self.args.vocab_size)
        given = None if batches is None else [vars(batch) for batch in batches]
        everywhere = self._on_all_stages(given, num_micro_batches)
        found = self._run(everywhere, lambda logits, asked: score(logits, (asked["at"], asked["queried"])))
        return found if self.place.last_stage else None

    @torch.inference_mode()
    def forward_cached(self, inputs: Tensor, tokens: CachedTokens) -> Tensor:
        first, layers = self._only_run()
        with self._around("forward"):
            return run_cached(layers, first, self.args.num_layers, inputs, tokens)

    @torch.inference_mode()
    def forward_pooled(self, inputs: Tensor, work: PooledTokens) -> tuple[Tensor, dict[int, Tensor]]:
        first, layers = self._only_run()
        with self._around("forward"):
            return run_pooled(layers, first, self.args.num_layers, inputs, work)

    def _only_run(self) -> tuple[int, list[Any]]:
        """Number of the first layer, and all layers, for a forward pass that the caller moves from rank to rank."""
        if self.stage.virtual > 1:
            raise RuntimeError("this forward pass needs one run of layers per rank: an engine built `for_inference`")
        return self.stage_layers(self.place.pp_rank).start, self.stage.chunks[0].callables()

    def _trained(self) -> GuardedOptimizer:
        if self._optimizer is None:
            raise RuntimeError("this engine has no optimizer: it was built for inference")
        return self._optimizer

    def _share_of_mean(self, replica_loss: Tensor | None) -> Tensor:
        """This rank's summand of the mean over replicas. Tensor-parallel ranks have the same loss; only one adds it."""
        if replica_loss is None or not self.place.counts_tokens:
            return torch.zeros((), device=self.place.device)
        return replica_loss / self.place.dp

    def _on_all_stages(self, given: Iterable[Mapping[str, Tensor]] | None, count: int) -> PipelineBatch:
        """`on_all_stages` for this rank, in the phase `data`. Collective over the pipeline."""
        with self._around("data"):
            return on_all_stages(given, count, self.place, self.groups.pipe, self.tensor_parallel.padded_length)

    def _run(self, batch: PipelineBatch, on_output: OnOutput, train: bool = False) -> list[Tensor]:
        """Run the schedule over all micro-batches; returns `on_output`'s results on the last stage, else none."""
        count, pp, chunks = len(batch.micro_batches), self.place.pp, len(self.model)
        if chunks > 1 and not train:  # the interleaved schedule needs a multiple of pp micro-batches
            batch = batch.filled_up(pp)

        def forward(source: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            micro_batch, documents = next(source)

            def finish(output: Tensor, non_loss_data: bool = False) -> Any:
                result = on_output(output, micro_batch)
                return result if non_loss_data else (result, result.detach().clone())

            return chunk(micro_batch, documents), finish

        sources = [zip(batch.micro_batches, batch.documents, strict=True) for _ in self.model]
        schedule: Callable[..., Any] = forward_backward_pipelining_with_interleaving
        if chunks == 1:
            schedule = forward_backward_pipelining_without_interleaving if pp > 1 else forward_backward_no_pipelining
        with schedule_on(self.place.device), torch.set_grad_enabled(train):
            results = schedule(
                forward_step_func=forward,
                data_iterator=sources if chunks > 1 else sources[0],
                model=list(self.model) if chunks > 1 else self.model[0],
                num_microbatches=len(batch.micro_batches),
                seq_length=batch.s,
                micro_batch_size=batch.b,
                forward_only=not train,
                collect_non_loss_data=not train,
                p2p_communicator=self._communicator,
                pg_collection=self._mcore_groups,
            )
        return list(results)[:count]

    # --- weights being gathered

    def _start_gathers(self) -> None:
        """Start all-gathers of the updated weights of all buckets, in the order of the next forward pass."""
        if not self.args.overlap_param_gather:
            return
        for chunk in self._wrapped:
            for group in reversed(chunk.bucket_groups):
                group.start_param_sync()

    def _finish_gathers(self) -> None:
        """Wait for all gathers in flight. Not collective."""
        if self._optimizer is None or not self.args.overlap_param_gather:
            return
        for chunk in self._wrapped:
            for group in chunk.bucket_groups:
                _finish_gather(group)

    def _finish_gather_of_tied_copy(self) -> None:
        """Wait for the gather of the matrix that the last stage's head shares with another stage."""
        for one in self._held:
            if one.copy and one.parameter.requires_grad and self.args.overlap_param_gather:
                _finish_gather(self._wrapped[-1].param_to_bucket_group[one.parameter])

    # --- checkpoints

    def meta_content(self) -> dict[str, Any]:
        """The keys of DeepSpeed's meta file that apply to this engine."""
        counters, place = self.counters, self.place
        return {
            "module": None,
            "engine": "megatron",
            "global_steps": counters.steps,
            "global_samples": counters.samples,
            "skipped_steps": counters.skipped,
            "dp_world_size": place.dp,
            "mp_world_size": place.tp * place.pp,
        }

    def optimizer_shards(self) -> list[OptimizerShard]:
        self._finish_gathers()
        return self._trained().ranges()

    def load_shards(self, read: ReadShard) -> None:
        self._finish_gathers()
        self._trained().load(read)


def _finish_gather(group: Any) -> None:
    """Wait for the weights of a group of buckets, if they are being gathered."""
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)
