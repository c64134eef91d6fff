"""megatron-core's distributed optimizer: steps that non-finite gradients cause to be skipped, state as ranges.

Every data-parallel rank owns a contiguous part of each bucket of parameters, and for each parameter in it a shard: the
master weights (in fp32 runs a view of the weights themselves), two moments and the number of updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor, nn

from megatron.common.errors import CheckpointError
from megatron.engine.optimizer import build_optimizer, parameter_groups
from megatron.engine.optimizer_shards import OptimizerShard, ReadShard, adam_state, check_masters
from megatron.layout import TensorRange, TensorRow
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place


@dataclass(frozen=True)
class HeldParameter:
    """A parameter of this rank, with its layer file number and name; `copy` marks a tied matrix of another stage."""

    layer: int
    name: str
    parameter: nn.Parameter
    row: TensorRow
    copy: bool


@dataclass(frozen=True)
class _OwnShard:
    """The part [start, stop) of a parameter whose state this rank holds; its fp32 master carries the gradient."""

    of: HeldParameter
    start: int
    stop: int
    master: Tensor


def build_distributed_optimizer(
    args: NeoXArgs, model: Sequence[DistributedDataParallel], held: Sequence[HeldParameter], data: dist.ProcessGroup
) -> DistributedOptimizer:
    """AdamW over this project's parameter groups, its state sharded over `data`."""
    rows = {id(one.parameter): one.row for one in held}
    groups = parameter_groups((one.parameter for one in held), rows, args.weight_decay)
    config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        weight_decay=args.weight_decay,
        bf16=args.precision == "bfloat16",
        params_dtype=model[0].module.config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=args.overlap_param_gather,
        clip_grad=args.gradient_clipping,
    )
    return DistributedOptimizer(
        build_optimizer(groups, args),
        config,
        grad_scaler=None,
        init_state_fn=None,
        model_chunks=list(model),
        per_model_buffers={number: chunk.buffers for number, chunk in enumerate(model)},
        data_parallel_group=data,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )


class GuardedOptimizer:
    """A rank's shards, and a step that is applied only if the norm of all gradients is finite.

    megatron-core's own step would apply non-finite gradients.
    """

    def __init__(
        self, args: NeoXArgs, place: Place, optimizer: DistributedOptimizer, held: Iterable[HeldParameter]
    ) -> None:
        self.args, self.place, self.optimizer = args, place, optimizer
        self.shards = list(_own_shards(optimizer, {one.parameter: one for one in held}))
        # A replicated parameter counts once. The other ranks' copies are multiplied by 0, which keeps non-finite
        # values: a NaN on a single rank (a faulty GPU) is in every rank's norm.
        self._counted = torch.tensor(
            [float(not shard.of.copy and (place.tp_rank == 0 or not shard.of.row.replicated)) for shard in self.shards],
            dtype=torch.float64,
            device=place.device,
        )

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, loss_part: Tensor) -> tuple[float, float, bool]:
        """Clip and apply the reduced gradients; returns (loss, norm, applied), the same on all ranks. Collective.

        `loss_part` is this rank's summand of the mean loss. If the norm is not finite, nothing changes.
        """
        self.optimizer.prepare_grads()
        gradients = [gradient for shard in self.shards if (gradient := shard.master.grad) is not None]
        assert len(gradients) == len(self.shards)
        square = torch.zeros((), dtype=torch.float64, device=self.place.device)
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients)).double()
            square = (norms.square() * self._counted).sum()
        sums = torch.stack([square, loss_part.detach().double()])
        dist.all_reduce(sums)
        square_norm, loss = sums.tolist()
        norm = math.sqrt(square_norm) if square_norm >= 0 else math.nan
        if not math.isfinite(norm):
            return loss, norm, False
        limit = self.args.gradient_clipping
        if gradients and 0 < limit < norm + 1e-6:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        self.optimizer.step_with_ready_grads()
        return loss, norm, True

    def renew_masters(self) -> None:
        """Copy the weights to the masters."""
        self.optimizer.reload_model_params()

    def ranges(self) -> list[OptimizerShard]:
        """This rank's state by ranges, in the order of its layers."""
        return [self._range(shard) for shard in self.shards]

    def _range(self, shard: _OwnShard) -> OptimizerShard:
        state = self._state(shard)
        tensors = {"master": shard.master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        where = TensorRange(shard.of.layer, shard.of.name, self.place.tp_rank, shard.start, shard.stop)
        return OptimizerShard(where, tensors, int(state["step"]), shard.of.copy)

    @torch.no_grad()
    def load(self, read: ReadShard) -> None:
        """Fill all ranges with `read`, after the weights are loaded.

        CheckpointError unless the weights are the masters, rounded, and all tensors are of one step.
        """
        first: OptimizerShard | None = None
        for shard in self.shards:
            found = self._range(shard)
            weights = shard.of.parameter.detach().view(-1)[shard.start : shard.stop].clone()
            step = read(found.where, found.tensors)
            check_masters(found.where, weights, found.tensors["master"])
            if first is not None and first.step != step:
                raise CheckpointError(f"{found.where} is of step {step}, {first.where} of step {first.step}")
            first = first or OptimizerShard(found.where, found.tensors, step)
            self._state(shard)["step"].fill_(step)

    def _state(self, shard: _OwnShard) -> dict[str, Tensor]:
        return adam_state(self.optimizer.optimizer, shard.master)


def _own_shards(optimizer: DistributedOptimizer, held: dict[nn.Parameter, HeldParameter]) -> Iterator[_OwnShard]:
    """Shards of all parameters of which this rank owns a part, in the order of `held`."""
    masters: dict[nn.Parameter, Tensor] = {}
    pairs = (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    )
    for parameter_lists, master_lists in pairs:
        for parameters, shards in zip(parameter_lists, master_lists, strict=True):
            masters.update(zip(parameters, shards, strict=True))
    for parameter, one in held.items():
        if parameter in masters:
            part = optimizer._get_model_param_range_map(parameter)["param"]
            yield _OwnShard(one, part.start, part.end, masters[parameter])
