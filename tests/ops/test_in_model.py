"""The whole model on the emulated kernels (`kernels: required` on the CPU) is as accurate as on the references.

Every parity test can run this way: `NEOX_TEST_KERNELS=required pytest tests/parity`, which the slow test here does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.neox_arguments import NeoXArgs
from megatron.ops.library import load_library
from tests.support.engine_runs import (
    build,
    inference,
    make_samples,
    rank_parameters,
    relative_difference,
    step,
    whole_logits,
    whole_model,
)
from tests.support.models import LLAMA3_ROPE, Case, fill_stage, gathered
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.kernels

CASE = Case(heads=8, kv_heads=2, head_dim=64, rope=LLAMA3_ROPE, theta=500000.0, seq=64)
PIPELINED = Case(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=88, vocab=160, rope=LLAMA3_ROPE, seq=24)
FLOOR = 2**-22  # relative to the largest value: the accuracy of an fp32 sum of hundreds of terms


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    load_library("cpu")  # built here, not by several ranks at once within their time limit


def _labels(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(case.vocab, (2, case.seq), generator=generator) for _ in range(2))
    labels[0, 5:20] = -100
    return ids, labels


def _logits_and_gradient(
    rank: int, world_size: int, case: Case, mode: str, precision: str
) -> tuple[str, Tensor, Tensor, Tensor]:
    """(description of the chosen ops, logits, losses, gradient of this rank's embedding rows)."""
    from megatron.engine.deepspeed_module import LlamaPipelineModule
    from megatron.model.loss import GlobalMeanLoss
    from megatron.ops import configure
    from megatron.parallel.process_groups import form_groups

    args = case.neox(model_parallel_size=world_size, world_size=world_size, kernels=mode, precision=precision)
    place = form_groups(args)
    chosen = configure(mode, place.device)
    model = LlamaPipelineModule(args, place)
    fill_stage(model, place, dict(case.hugging_face().state_dict()), args)
    ids, labels = _labels(case)
    logits = model(ids)
    losses = GlobalMeanLoss(model.tensor_parallel.group, args.vocab_size).token_losses(logits, labels)
    losses.sum().backward()
    embedding = next(p for name, p in model.named_parameters() if "word_embeddings" in name)
    assert embedding.grad is not None
    whole = gathered(logits.detach(), model.tensor_parallel.group)[..., : case.vocab]
    return chosen, whole, losses.detach(), embedding.grad


def truth(case: Case, rounded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, losses and embedding gradient of transformers in fp64, with the model's weights."""
    model = case.hugging_face()
    model = (model.bfloat16() if rounded else model).double()
    ids, labels = _labels(case)
    logits = model(ids).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses.sum().backward()
    return logits.detach(), losses.detach().view(labels.shape), model.model.embed_tokens.weight.grad


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_kernels_are_as_right_as_the_references(tp: int, precision: str) -> None:
    exact = truth(CASE, precision == "bfloat16")
    results: dict[str, list[Any]] = {}
    for mode in ("reference", "required"):
        ranks = run_ranks(_logits_and_gradient, tp, CASE, mode, precision)
        gradient = torch.cat([r[3] for r in ranks])[: CASE.vocab]
        results[mode] = [ranks[0][0], ranks[0][1], ranks[0][2], gradient]
    assert "PyTorch references" in results["reference"][0]
    assert "host emulator" in results["required"][0]
    kernels, references = results["required"][1:], results["reference"][1:]
    assert not all(torch.equal(a, b) for a, b in zip(kernels, references, strict=True)), "both ran the same code"
    names = ("logits", "losses", "embedding gradient")
    for name, kernel, plain, true in zip(names, kernels, references, exact, strict=True):
        error, own = ((t.double() - true).abs().max() for t in (kernel, plain))
        assert error <= max(2 * own, FLOOR * true.abs().max()), f"{name}: {error:.3g}, the references have {own:.3g}"


def _on_kernels(rank: int, world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    os.environ["NEOX_TEST_KERNELS"] = "required"  # affects this rank's process only
    return function(rank, world_size, *args)


def _difference_from_transformers(rank: int, world_size: int, case: Case) -> float:
    """The largest difference of a logit."""
    reference = case.hugging_face()
    args = case.neox(model_parallel_size=world_size, world_size=world_size)
    ids, _ = _labels(case)
    ours = whole_logits(inference(args, dict(reference.state_dict())), args, ids)
    assert ours is not None
    with torch.no_grad():
        return float((ours - reference(ids).logits).abs().max())


@pytest.mark.parametrize("tp", [1, 4])
def test_logits_equal_transformers_on_kernels(tp: int) -> None:
    case = Case(heads=8, kv_heads=8, head_dim=128, rope=LLAMA3_ROPE, theta=500000.0, seq=128)
    assert max(run_ranks(_on_kernels, tp, _difference_from_transformers, case)) < 1e-5


def _two_by_two() -> NeoXArgs:
    return PIPELINED.neox(
        model_parallel_size=2,
        pipe_parallel_size=2,
        gradient_accumulation_steps=4,
        gradient_clipping=0.5,  # below the observed norms, so that clipping takes effect
        checkpoint_activations=True,
        world_size=4,
    )


def _three_steps(rank: int, world_size: int) -> Any:
    """([(loss, gradient norm) by step], this rank's parameters)."""
    args = _two_by_two()
    engine = build(args, PIPELINED)
    samples = make_samples(PIPELINED, 24)
    history = [step(engine, args, samples[8 * n : 8 * n + 8], n) for n in range(3)]
    return history, rank_parameters(engine)


def test_a_pipeline_trains_on_kernels_as_on_references() -> None:
    """Three optimizer steps over two stages of two ranks, activations recomputed."""
    kernels = run_ranks(_on_kernels, 4, _three_steps)
    references = run_ranks(_three_steps, 4)
    for (loss, norm), (expected_loss, expected_norm) in zip(kernels[0][0], references[0][0], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-6)
    whole, expected = (
        whole_model([parameters for _, parameters in results], _two_by_two()) for results in (kernels, references)
    )
    assert whole.keys() == expected.keys()
    for name, tensor in whole.items():
        assert relative_difference(tensor, expected[name]) < 1e-5, name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_parity_test_passes_on_kernels() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "tests/parity", "-q", "-m", "not slow"]
    environment = os.environ | {"NEOX_TEST_KERNELS": "required"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
