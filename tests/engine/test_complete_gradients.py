"""Gradients of parameters that the layout marks as replicated are summed over tensor-parallel ranks before a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.engine.optimizer import GROUP_NAMES

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_every_replicated_group_is_summed_decayed_or_not(
    sequence_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.engine import deepspeed

    summed: list[float] = []
    monkeypatch.setattr(deepspeed, "sum_over_slices", lambda parts, group: summed.extend(float(p[0]) for p in parts))
    kinds = list(GROUP_NAMES)
    optimizer = SimpleNamespace(
        param_groups=[{"name": GROUP_NAMES[kind]} for kind in kinds],
        averaged_gradients=[[torch.full((2,), float(number))] for number in range(len(kinds))],
    )
    engine: Any = SimpleNamespace(
        pipeline_engine=SimpleNamespace(optimizer=optimizer),
        module=SimpleNamespace(tensor_parallel=SimpleNamespace(sequence_parallel=sequence_parallel)),
        groups=SimpleNamespace(tensor=None),
    )
    deepspeed.DeepSpeedEngine.complete_gradients(engine)
    replicated = [number for number, (_, whole) in enumerate(kinds) if whole]
    assert len(replicated) == 2
    assert summed == (replicated if sequence_parallel else [])
