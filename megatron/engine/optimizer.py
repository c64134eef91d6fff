"""AdamW and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from megatron.neox_arguments import NeoXArgs

DECAYED, UNDECAYED = "weight_decay_params", "no_weight_decay_params"


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices (embedding and head included) decay, norms do not; GPT-NeoX's grouping.

    Group names are kept: the log and the checkpoint show them. Empty groups are left out, which the ranks of a
    pipeline must tolerate: a stage may hold an embedding and nothing else.
    """
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "name": DECAYED},
        {"params": vectors, "weight_decay": 0.0, "name": UNDECAYED},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, args: NeoXArgs) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over this rank's parameters; DeepSpeed shards its state by ZeRO-1."""
    beta1, beta2 = args.optimizer.params.betas
    return torch.optim.AdamW(
        parameter_groups(module, args.weight_decay),
        lr=args.lr,
        betas=(beta1, beta2),
        eps=args.optimizer.params.eps,
        fused=True,
    )
