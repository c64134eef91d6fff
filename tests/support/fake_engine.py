"""A minimal engine in plain torch, on one process without a pipeline: a run needs only the engine protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.engine.batches import MicroBatch, ScoreBatch, StepBatch
from megatron.engine.nonfinite import poisoned
from megatron.engine.optimizer import build_optimizer, parameter_groups, rows_of_parameters
from megatron.engine.optimizer_shards import OptimizerShard, ReadShard
from megatron.engine.protocol import Around, Counters, StepResult, no_phases
from megatron.layout import TensorRange
from megatron.model.cache import CachedTokens, run_cached
from megatron.model.documents import from_message
from megatron.model.initialize import initialize_layers
from megatron.model.loss import GlobalMeanLoss
from megatron.model.parallel import TensorParallel
from megatron.model.pipeline import llama_layers
from megatron.model.scores import TokenScores
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place
from megatron.parallel.process_groups import ModelGroups


class FakeEngine:
    """`megatron.engine.protocol.Engine` for one rank in fp32."""

    def __init__(self, args: NeoXArgs, place: Place, around: Around = no_phases) -> None:
        assert place.world_size == 1
        world = dist.group.WORLD
        assert world is not None
        self.args, self.place, self.around = args, place, around
        self.groups = ModelGroups(tensor=world, data=world, pipe=world)
        self.counters = Counters()
        self._shared: dict[str, nn.Module] = {}
        self._layers = [self._build(layer) for layer in llama_layers(args, TensorParallel(world, torch.float32))]
        self._loss = GlobalMeanLoss(world, args.vocab_size)
        rows = {id(p): row for p, row in rows_of_parameters(self.numbered_layers(), args.shape)}
        self._optimizer: torch.optim.Optimizer | None = None
        if args.optimizer is not None:
            self._optimizer = build_optimizer(parameter_groups(self._parameters(), rows, args.weight_decay), args)

    def _build(self, layer: Any) -> tuple[nn.Module | None, Any]:
        """(module, function applied to the input) of a layer; shared modules are built once."""
        if layer.build is None:
            return None, layer.function
        if layer.shares in self._shared:
            module = self._shared[layer.shares]
            return None, lambda x: layer.function(module, x)
        module = layer.build(*layer.arguments)
        if layer.shares is not None:
            self._shared[layer.shares] = module
        return module, module

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for _, layer in self.numbered_layers() for parameter in layer.parameters()]

    def _forward(self, message: Any) -> Tensor:
        inputs = from_message(message)
        for _, apply in self._layers:
            inputs = apply(inputs)
        return inputs

    def _losses(self, batch: StepBatch) -> Iterator[Tensor]:
        """The contribution of each micro-batch to the mean loss over all."""
        assert batch.micro_batches is not None
        for micro_batch in batch.micro_batches:
            with self.around("forward"):
                logits = self._forward(_inputs(micro_batch))
                loss = self._loss(logits, (micro_batch["labels"], batch.weight)) / batch.num_micro_batches
            yield loss

    # --- the protocol

    def describe(self) -> list[str]:
        return ["engine: plain torch"]

    def numbered_layers(self) -> Iterator[tuple[int, nn.Module]]:
        return ((number, module) for number, (module, _) in enumerate(self._layers) if module is not None)

    def tied_copies(self) -> Iterator[tuple[int, nn.Module]]:
        return iter(())

    def stage_layers(self, stage: int) -> range:
        return range(len(self._layers))

    def initialize_weights(self) -> None:
        initialize_layers(self.numbered_layers(), self.args, tp=1, tp_rank=0)

    def weights_changed(self) -> None:
        pass

    def set_learning_rate(self, rate: float) -> None:
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def train_step(self, batch: StepBatch) -> StepResult:
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        total = 0.0
        for loss in self._losses(batch):
            with self.around("backward"):
                poisoned(loss).backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters(), self.args.gradient_clipping))
        applied = math.isfinite(norm)
        if applied:
            with self.around("optimizer"):
                self._optimizer.step()
        before = self.counters
        self.counters = Counters(
            before.steps + 1, before.samples + self.args.train_batch_size, before.skipped + (not applied)
        )
        return StepResult(total, norm, applied, replica_loss=total)

    @torch.no_grad()
    def evaluate(self, batch: StepBatch) -> float:
        return float(sum(self._losses(batch)))

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor | None:
        return self._forward(tokens if positions is None else (tokens, positions))

    @torch.no_grad()
    def forward_cached(self, inputs: Tensor, tokens: CachedTokens) -> Tensor:
        return run_cached([apply for _, apply in self._layers], 0, self.args.num_layers, inputs, tokens)

    @torch.no_grad()
    def token_scores(self, batches: Iterable[ScoreBatch] | None, num_micro_batches: int) -> list[Tensor] | None:
        scores = TokenScores(self.groups.tensor, self.args.vocab_size)
        return [scores(self._forward(batch.tokens), (batch.at, batch.queried)) for batch in batches or ()]

    def meta_content(self) -> dict[str, Any]:
        counters = self.counters
        return {
            "module": None,
            "global_steps": counters.steps,
            "global_samples": counters.samples,
            "skipped_steps": counters.skipped,
        }

    def optimizer_shards(self) -> list[OptimizerShard]:
        return [
            OptimizerShard(
                TensorRange(layer, name, 0, 0, parameter.numel()),
                {kind: tensor.detach().view(-1) for kind, tensor in self._state(parameter).items() if kind != "step"},
                step=int(self._state(parameter)["step"]),
            )
            for layer, module in self.numbered_layers()
            for name, parameter in module.named_parameters()
        ]

    def load_shards(self, read: ReadShard) -> None:
        parameters = [p for _, module in self.numbered_layers() for p in module.parameters()]
        for parameter, shard in zip(parameters, self.optimizer_shards(), strict=True):
            self._state(parameter)["step"].fill_(read(shard.where, shard.tensors))

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """In fp32 the master is the parameter itself."""
        assert self._optimizer is not None
        state = self._optimizer.state[parameter]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter, requires_grad=False)}
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        return {"master": parameter, **state}


def _inputs(micro_batch: MicroBatch) -> Any:
    if "positions" in micro_batch:
        return micro_batch["tokens"], micro_batch["positions"]
    return micro_batch["tokens"]
