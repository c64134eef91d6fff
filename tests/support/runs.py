"""Whole training runs inside forked ranks, and their output files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.supervision.signals import StopRequest
from tests.support.models import Case

if TYPE_CHECKING:
    from megatron.trainer.run import Run


def run_case(
    case: Case, world_size: int, keys: dict[str, Any], run: type[Run] | None = None, stop: StopRequest | None = None
) -> Run:
    """Train `case` on all ranks of the harness, with additional `keys`; `run` may be a subclass that injects faults."""
    from megatron.parallel.process_groups import form_groups
    from megatron.trainer.run import Run

    args = case.neox(world_size=world_size, **keys)
    training = (run or Run)(args, form_groups(args), stop)
    training.execute()
    return training


def metrics(folder: Path, key: str) -> dict[int, float]:
    """A value of `log/metrics.jsonl` by iteration."""
    records = [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]
    return {r["iteration"]: r[key] for r in records if key in r}


def weights(folder: Path, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint's layer files."""
    files = sorted((folder / f"checkpoints/global_step{step}").glob("layer_*.pt"))
    assert files
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in torch.load(file).items()}
