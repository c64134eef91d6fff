"""Every TP x PP x DP split trains the same model as one process; so does a plain `transformers` loop."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.support.engine_runs import (
    Samples,
    build,
    make_samples,
    rank_parameters,
    relative_difference,
    step,
    whole_model,
)
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks
from tests.support.splits import SPLITS

pytestmark = pytest.mark.distributed

GLOBAL_BATCH, STEPS = 8, 5
FAST = [(2, 1, 1), (1, 2, 2), (2, 2, 2)]
UNTIED = Case(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=88, vocab=160, rope=LLAMA3_ROPE, seq=24)
TIED = Case(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=88, vocab=160, tied=True, seq=24)


def arguments(case: Case, split: tuple[int, int, int], **overrides: Any) -> Any:
    tp, pp, dp = split
    micro = 2
    keys = {
        "model_parallel_size": tp,
        "pipe_parallel_size": pp,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": GLOBAL_BATCH // (micro * dp),
        "gradient_clipping": 0.5,  # below the observed norms, so that clipping takes effect
        "checkpoint_activations": True,
        "world_size": tp * pp * dp,
    }
    return case.neox(**(keys | overrides))


def _train(rank: int, world_size: int, case: Case, split: tuple[int, int, int], overrides: dict, evals: bool) -> Any:
    args = arguments(case, split, **overrides)
    engine = build(args, case)
    samples = make_samples(case, GLOBAL_BATCH * STEPS)
    history = []
    for iteration in range(STEPS):
        batch = samples[iteration * GLOBAL_BATCH : (iteration + 1) * GLOBAL_BATCH]
        history.append(step(engine, args, batch, iteration))
        if evals:
            from megatron.evaluation.perplexity import evaluate

            evaluate(engine, args, Samples(samples[:3]))
            evaluate(engine, args, Samples(samples[3:10]))
    return history, rank_parameters(engine), type(engine.pipeline_engine.optimizer).__name__


@cache
def trained(case: Case, split: tuple[int, int, int], evals: bool = False, precision: str = "fp32") -> Any:
    """([(loss, gradient norm) per step], whole model, optimizer class)."""
    tp, pp, dp = split
    results = run_ranks(_train, tp * pp * dp, case, split, {"precision": precision}, evals)
    histories = [history for history, _, _ in results]
    assert all(history == histories[0] for history in histories), "ranks disagree about the loss"
    whole = whole_model([parameters for _, parameters, _ in results], arguments(case, split))
    return histories[0], whole, results[0][2]


def assert_same_training(a: Any, b: Any, loss: float, parameters: float) -> None:
    for step_number, ((loss_a, norm_a), (loss_b, norm_b)) in enumerate(zip(a[0], b[0], strict=True)):
        assert loss_a == pytest.approx(loss_b, rel=loss), f"loss of step {step_number}"
        assert norm_a == pytest.approx(norm_b, rel=loss), f"gradient norm of step {step_number}"
    assert a[1].keys() == b[1].keys()
    for name, tensor in a[1].items():
        assert relative_difference(tensor, b[1][name]) < parameters, name


@pytest.mark.parametrize("case", [pytest.param(UNTIED, id="untied"), pytest.param(TIED, id="tied")])
@pytest.mark.parametrize(
    "split",
    [split if split in FAST else pytest.param(split, marks=pytest.mark.slow) for split in SPLITS[1:]],
    ids=lambda s: "tp{}pp{}dp{}".format(*s),
)
def test_every_layout_trains_the_same_model(case: Case, split: tuple[int, int, int]) -> None:
    assert_same_training(trained(case, split), trained(case, (1, 1, 1)), loss=1e-6, parameters=1e-5)


def _recomputed(rank: int, world_size: int, recompute: int | None) -> tuple[Any, dict[int, int]]:
    """Train stages of two layers; also returns how often each layer ran in a step of two micro-batches."""
    from megatron.model.llama import TransformerLayer

    args = arguments(UNTIED, (1, 2, 1), recompute_layers=recompute, gradient_accumulation_steps=2)
    engine = build(args, UNTIED)
    runs: dict[int, int] = {}
    for index, layer in engine.numbered_layers():
        if isinstance(layer, TransformerLayer):
            layer.register_forward_pre_hook(lambda *_, i=index: runs.update({i: runs.get(i, 0) + 1}))
    return step(engine, args, make_samples(UNTIED, 4)), runs


def test_only_some_layers_are_recomputed_and_nothing_changes() -> None:
    """Layers 2 to 5 of the checkpoint are on two stages; a recomputed layer runs twice for each micro-batch."""
    every, one = (run_ranks(_recomputed, 2, recompute) for recompute in (None, 1))
    assert [runs for _, runs in every] == [{2: 4, 3: 4}, {4: 4, 5: 4}]
    assert [runs for _, runs in one] == [{2: 4, 3: 2}, {4: 4, 5: 2}]
    assert [history for history, _ in one] == [history for history, _ in every]


@pytest.mark.parametrize("split", [(1, 2, 2), (2, 2, 1)], ids=lambda s: "tp{}pp{}dp{}".format(*s))
def test_evaluation_between_steps_changes_nothing(split: tuple[int, int, int]) -> None:
    quiet, evaluated = trained(UNTIED, split), trained(UNTIED, split, evals=True)
    assert quiet[0] == evaluated[0]
    for name, tensor in quiet[1].items():
        assert torch.equal(tensor, evaluated[1][name]), name


@pytest.mark.parametrize("split", [(2, 2, 2)], ids=lambda s: "tp{}pp{}dp{}".format(*s))
def test_bf16_layouts_agree_within_its_rounding(split: tuple[int, int, int]) -> None:
    """bf16 has 8 bits: sums in another order differ by a few 2^-8 of an activation.

    Observed: loss 8e-5, gradient norm 3.6e-3, parameters 8.8e-3 (Adam's first steps turn the sign of a tiny gradient
    into a full step). The bounds are three times these values.
    """
    one, many = trained(UNTIED, (1, 1, 1), precision="bfloat16"), trained(UNTIED, split, precision="bfloat16")
    assert one[2] == many[2] == "BF16_Optimizer"
    for (loss_a, norm_a), (loss_b, norm_b) in zip(one[0], many[0], strict=True):
        assert loss_a == pytest.approx(loss_b, rel=2.5e-4)
        assert norm_a == pytest.approx(norm_b, rel=1.1e-2)
    for name, tensor in one[1].items():
        assert relative_difference(tensor, many[1][name]) < 2.7e-2, name


def transformers_loop(case: Case) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The same training as a straightforward PyTorch loop."""
    import torch.nn.functional as F

    model = case.hugging_face().train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    samples = make_samples(case, GLOBAL_BATCH * STEPS)
    history = []
    for iteration in range(STEPS):
        batch = samples[iteration * GLOBAL_BATCH : (iteration + 1) * GLOBAL_BATCH]
        tokens = torch.stack([s["tokens"] for s in batch])
        labels = torch.stack([s["labels"] for s in batch])
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if case.tied:
        del state["lm_head.weight"]
    return history, state


@pytest.mark.parametrize("case", [pytest.param(UNTIED, id="untied"), pytest.param(TIED, id="tied")])
def test_one_process_equals_a_transformers_loop(case: Case) -> None:
    history, state = transformers_loop(case)
    assert_same_training(trained(case, (1, 1, 1)), (history, state), loss=1e-5, parameters=1e-5)
