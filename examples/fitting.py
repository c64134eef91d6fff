"""The training loop of the examples' stand-ins for downloaded models, with `transformers` and torch alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedModel


def fit(
    model: PreTrainedModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    steps: int,
    name: str,
) -> float:
    """Take `steps` steps on batches (ids, labels), int64 [rows, tokens], with gradients clipped to a norm of 1.

    Returns the last step's loss in nats per token.
    """
    model.train()
    last = float("nan")
    for ids, labels in (bar := tqdm(batches, total=steps, desc=name, disable=not sys.stderr.isatty())):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = loss.item()
        bar.set_postfix(loss=f"{last:.3f}")
    return last
