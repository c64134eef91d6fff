"""Training adapters at any TP x PP x DP equals training with peft on `transformers`' Llama; the base is unchanged."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.support.engine_runs import make_samples, rank_parameters, relative_difference, step, whole_model
from tests.support.lora import (
    ALL,
    ALPHA,
    BATCH,
    CLIPPING,
    GQA,
    MHA,
    RANK,
    STEPS,
    TIED,
    Layout,
    adapter_state,
    build_adapted,
    lora_arguments,
    moved,
    peft_training,
    without_gradient,
)
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SEQUENCE = {"sequence_parallel": True}
STORED = {"checkpoint_activations": False}
SOME = {"recompute_layers": 1}
MEGATRON = {"engine": "megatron"}
VIRTUAL = {"virtual_pipe_parallel_size": 2}


def _train(rank: int, world_size: int, case: Case, split: Layout, overrides: dict, targets: tuple[str, ...]) -> Any:
    args = lora_arguments(case, split, **overrides)
    engine = build_adapted(args, case, adapter_state(case, targets))
    frozen = {
        (index, name): parameter.detach().clone()
        for index, layer in engine.numbered_layers()
        for name, parameter in layer.named_parameters()
        if not parameter.requires_grad
    }
    samples, history, learning = make_samples(case, BATCH * STEPS), [], {}
    for number in range(STEPS):
        history.append(step(engine, args, samples[number * BATCH : (number + 1) * BATCH], number))
        if number == 0:
            learning = moved(engine)
    parameters = rank_parameters(engine)
    assert all(torch.equal(parameters.tensors[key], tensor) for key, tensor in frozen.items()), "the base has changed"
    parameters.tensors = {key: tensor for key, tensor in parameters.tensors.items() if key not in frozen}
    state = [shard.tensors["master"].numel() for shard in engine.optimizer_shards()]
    return history, parameters, learning, sum(state)


def trained(case: Case, split: Layout, overrides: dict[str, Any] | None = None, targets: Any = ALL) -> Any:
    """([(loss, gradient norm) per step], the adapter by peft's names, elements of optimizer state by rank)."""
    tp, pp, dp = split
    overrides = overrides or {}
    results = run_ranks(_train, tp * pp * dp, case, split, overrides, targets)
    assert all(result[0] == results[0][0] for result in results), "ranks disagree about the loss"
    assert without_gradient([result[2] for result in results]) == []
    whole = whole_model([parameters for _, parameters, _, _ in results], lora_arguments(case, split, **overrides))
    return results[0][0], {f"base_model.model.{name}": t for name, t in whole.items()}, [r[3] for r in results]


@cache
def reference(case: Case, targets: tuple[str, ...] = ALL, rslora: bool = False) -> Any:
    state = adapter_state(case, targets)
    return peft_training(case, state, STEPS, BATCH, CLIPPING, target_modules=list(targets), use_rslora=rslora)


def assert_same(found: Any, expected: Any, loss: float = 1e-5, norm: float = 1e-4, factors: float = 2e-3) -> None:
    for number, ((our_loss, our_norm), (their_loss, their_norm)) in enumerate(zip(found[0], expected[0], strict=True)):
        assert our_loss == pytest.approx(their_loss, abs=loss), f"loss of step {number}"
        assert our_norm == pytest.approx(their_norm, rel=norm), f"gradient norm of step {number}"
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert relative_difference(found[1][name], tensor) < factors, name


def _case(case: Case, split: Layout, overrides: dict[str, Any], fast: bool = False) -> Any:
    kind = {GQA: "gqa", MHA: "mha", TIED: "tied"}[case]
    words = [f"{name}={value}" for name, value in overrides.items()]
    return pytest.param(
        case,
        split,
        overrides,
        id="-".join([kind, "tp{}pp{}dp{}".format(*split), *words]),
        marks=[] if fast else [pytest.mark.slow],
    )


@pytest.mark.parametrize(
    ("case", "split", "overrides"),
    [
        _case(GQA, (1, 1, 1), {}),
        _case(GQA, (2, 1, 1), {}),
        _case(GQA, (1, 1, 2), {}),
        _case(GQA, (4, 1, 1), STORED),
        _case(GQA, (1, 4, 1), {}),
        _case(GQA, (2, 1, 2), SOME),
        _case(GQA, (1, 2, 2), SOME),
        _case(GQA, (2, 2, 2), {}, fast=True),
        _case(GQA, (2, 2, 1), SEQUENCE, fast=True),
        _case(GQA, (4, 2, 1), SEQUENCE | STORED),
        _case(MHA, (2, 2, 1), {}),
        _case(MHA, (2, 2, 1), SEQUENCE),
        _case(MHA, (1, 2, 1), STORED),
        _case(TIED, (2, 2, 1), {}),
        _case(TIED, (2, 2, 2), SEQUENCE),
        _case(TIED, (1, 2, 1), SOME),
        _case(GQA, (1, 1, 1), MEGATRON),
        _case(GQA, (2, 2, 2), MEGATRON | SEQUENCE | VIRTUAL, fast=True),
        _case(GQA, (1, 2, 1), MEGATRON | VIRTUAL | {"recompute": "selective", "checkpoint_activations": False}),
        _case(MHA, (2, 1, 2), MEGATRON | SEQUENCE | STORED),
        _case(TIED, (2, 2, 1), MEGATRON),
        _case(TIED, (1, 2, 2), MEGATRON | VIRTUAL | SOME),
    ],
)
def test_adapters_train_as_peft_trains_them(case: Case, split: Layout, overrides: dict[str, Any]) -> None:
    found = trained(case, split, overrides)
    assert_same(found, reference(case))
    # Optimizer states exist for the adapter only, each element on one data-parallel rank.
    sizes, tp = lora_arguments(case, split), split[0]
    replicated = sum(t.numel() for n, t in found[1].items() if ("lora_A" in n) != _by_columns(n))
    assert sum(found[2]) == sizes.trained_shape.num_parameters + (tp - 1) * replicated


def _by_columns(name: str) -> bool:
    return "o_proj" in name or "down_proj" in name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_bf16_stays_within_its_bounds(engine: str) -> None:
    """Weights, activations and factors in bf16 against peft in fp32, within the bounds stated in docs/lora.md."""
    keys = {"precision": "bfloat16", "engine": engine}
    for case, split in ((GQA, (2, 1, 1)), (TIED, (1, 2, 2))):
        found, expected = trained(case, split, keys), reference(case)
        losses = [abs(ours[0] - theirs[0]) for ours, theirs in zip(found[0], expected[0], strict=True)]
        norms = [abs(ours[1] / theirs[1] - 1) for ours, theirs in zip(found[0], expected[0], strict=True)]
        print(engine, split, max(losses), max(norms))
        assert max(losses) < 5e-3
        assert max(norms) < 0.1


def test_some_targets_alone_and_rslora() -> None:
    """A projection without an adapter in a fused matrix gets zeros, head by head or in blocks."""
    targets = ("q_proj", "v_proj", "up_proj")
    lora = {"rank": RANK, "alpha": ALPHA, "targets": list(targets), "rslora": True}
    for case in (GQA, MHA):
        assert_same(trained(case, (2, 1, 1), {"lora": lora}, targets), reference(case, targets, rslora=True))
