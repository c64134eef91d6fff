"""The state of DeepSpeed's two ZeRO-1 optimizers as ranges of parameters, read and filled in place.

Both keep one flat fp32 partition per parameter group, which a torch AdamW updates; DeepSpeed records on every parameter
where its fragment is in the rank's partition (`_hp_mapping`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatron.common.errors import CheckpointError
from megatron.engine.optimizer_shards import OptimizerShard, ReadShard, adam_state, check_masters
from megatron.layout import TensorRange

NumberedLayers = Iterable[tuple[int, nn.Module]]


def optimizer_shards(
    optimizer: Any, layers: NumberedLayers, copies: NumberedLayers, tp_rank: int
) -> list[OptimizerShard]:
    """This rank's ranges, in the order of its layers; those of `copies` are marked. Not collective."""
    states = [adam_state(optimizer, group["params"][0]) for group in optimizer.param_groups]
    steps = [int(state["step"]) for state in states]
    shards = []
    for is_copy, numbered in ((False, layers), (True, copies)):
        for layer, module in numbered:
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is None:  # entirely on other data-parallel ranks
                    continue
                group = mapping.param_group_index
                start, first = int(mapping.lp_fragment_address.start), int(mapping.hp_fragment_address.start)
                count = int(mapping.lp_fragment_address.numel)
                where = TensorRange(int(layer), name, tp_rank, start, start + count)  # DeepSpeed numbers by numpy
                flat = {"master": optimizer.param_groups[group]["params"][0], **states[group]}
                tensors = {
                    kind: flat[kind].detach().narrow(0, first, count) for kind in ("master", "exp_avg", "exp_avg_sq")
                }
                shards.append(OptimizerShard(where, tensors, steps[group], is_copy))
    return shards


@torch.no_grad()
def load_shards(optimizer: Any, layers: NumberedLayers, copies: NumberedLayers, tp_rank: int, read: ReadShard) -> None:
    """Fill all ranges with `read`, after loading the weights. CheckpointError unless these are the masters, rounded."""
    numbered = [*layers], [*copies]
    parameters = {
        (layer, name): parameter
        for part in numbered
        for layer, module in part
        for name, parameter in module.named_parameters()
    }
    steps: dict[int, int] = {}
    for shard in optimizer_shards(optimizer, *numbered, tp_rank):
        where = shard.where
        parameter = parameters[where.layer, where.tensor]
        group = parameter._hp_mapping.param_group_index  # type: ignore[attr-defined]
        step = read(where, shard.tensors)
        if steps.setdefault(group, step) != step:
            raise CheckpointError(f"{where} is of step {step}, other tensors of its group of step {steps[group]}")
        check_masters(where, parameter.detach().view(-1)[where.start : where.stop], shard.tensors["master"])
    for group, step in steps.items():
        adam_state(optimizer, optimizer.param_groups[group]["params"][0])["step"].fill_(step)
