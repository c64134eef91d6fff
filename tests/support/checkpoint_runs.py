"""Trains, saves and resumes small models, and compares their checkpoints."""

from __future__ import annotations

import random
import threading
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.checkpoint import background, save
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.torch_files import read_file
from megatron.engine.protocol import Engine
from tests.support.engine_runs import build, load, make_samples, rank_parameters, step
from tests.support.log_lines import LogLines
from tests.support.models import Case

BATCH, STEPS, STOP = 8, 4, 2
CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=40, vocab=64, seq=16)
TIED = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=40, vocab=64, seq=16, tied=True)


def arguments(case: Case, tp: int, pp: int, dp: int, **keys: Any) -> Any:
    return case.neox(
        model_parallel_size=tp,
        pipe_parallel_size=pp,
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=BATCH // dp,
        train_iters=STEPS,
        world_size=tp * pp * dp,
        **keys,
    )


def train(engine: Engine, args: Any, state: TrainState, steps: int, case: Case = CASE) -> list[tuple[float, float]]:
    """Train `steps` steps, advancing `state`; returns (loss, gradient norm) of each."""
    samples = make_samples(case, BATCH * STEPS)
    history = []
    for _ in range(steps):
        batch = samples[state.consumed_samples : state.consumed_samples + BATCH]
        history.append(step(engine, args, batch, state.iteration))
        state.iteration += 1
        state.consumed_samples += BATCH
    return history


def masters(engine: Any) -> list[Tensor]:
    """This rank's part of the fp32 masters."""
    optimizer = engine.pipeline_engine.optimizer
    bf16 = type(optimizer).__name__ == "BF16_Optimizer"
    groups = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    return [group.detach().clone() for group in groups]


def resume(rank: int, world_size: int, case: Case, split: tuple, precision: str, folder: str) -> Any:
    """Start from different weights, load the whole state, and train to the end."""
    args = arguments(case, *split, precision=precision, load=folder, from_scratch=False)
    engine = build(args, case, seed=1)  # other weights: whatever is right after loading came from the files
    random.seed(rank + 100)
    torch.manual_seed(rank + 100)
    log = LogLines(rank)
    state = load(engine, args, {"toy": "2"})
    assert (state.iteration, state.consumed_samples, engine.counters.steps) == (STOP, STOP * BATCH, STOP)
    draws = random.random(), float(torch.rand(()))
    history = train(engine, args, state, STEPS - STOP)
    return history, rank_parameters(engine).tensors, masters(engine), draws, log.lines + log.warnings


class Gate:
    """Holds back the writing threads of this process until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        write = save.CheckpointWriter.write
        opened = self._open

        def held(writer: Any, contents: Any) -> None:
            assert opened.wait(60)
            write(writer, contents)

        background.CheckpointWriter.write = held  # type: ignore[method-assign]

    def open(self) -> None:
        self._open.set()


def file_differences(one: Path, other: Path) -> list[str]:
    """Where the files of two checkpoints differ; tensors are compared bit for bit."""
    names = sorted(path.name for path in [*one.glob("*.pt"), *one.glob("*.safetensors")])
    assert names == sorted(path.name for path in [*other.glob("*.pt"), *other.glob("*.safetensors")])
    contents = ([_content(folder / name) for folder in (one, other)] for name in names)
    return [place for name, pair in zip(names, contents, strict=True) for place in _differences(*pair, name)]


def _content(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else read_file(path)


def _differences(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.requires_grad == other.requires_grad
        return [] if same and _raw(one) == _raw(other) else [where]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return [place for key in one for place in _differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), where
        return [
            place
            for i, pair in enumerate(zip(one, other, strict=True))
            for place in _differences(*pair, f"{where}/{i}")
        ]
    if hasattr(one, "__dict__") and not is_dataclass(one) and not isinstance(one, Enum):
        return _differences(vars(one), vars(other), where)
    return [] if one == other else [where]


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
