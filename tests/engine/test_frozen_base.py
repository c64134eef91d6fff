"""Three pitfalls of DeepSpeed's pipeline with frozen weights, each with and without its guard.

`docs/lora.md` describes them. Each case has its own forked ranks, because a failure leaves other ranks waiting.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.engine_runs import make_samples, step
from tests.support.lora import GQA, TIED, adapter_state, build_adapted, lora_arguments, moved, without_gradient
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _first_step(rank: int, world_size: int, case: Case, split: tuple, overrides: dict, trap: str | None) -> Any:
    """(loss, gradient norm, factors that got a gradient) of one step; `trap` removes a guard."""
    from megatron.engine import deepspeed_module
    from megatron.model import pipeline

    if trap == "frozen input":

        def unguarded(stream: Any) -> Any:
            hidden, positions = stream if isinstance(stream, tuple) else (stream, None)
            hidden = hidden.transpose(0, 1).contiguous()
            return hidden if positions is None else (hidden, positions)

        pipeline.sequence_first = unguarded
    if trap == "tied weights":
        theirs = deepspeed_module.PipelineModule.get_tied_weights_and_groups
        deepspeed_module.LlamaPipelineModule.get_tied_weights_and_groups = theirs  # type: ignore[method-assign]
    if trap == "a stage with nothing to train":
        deepspeed_module.require_training = lambda stages, args: None
    args = lora_arguments(case, split, **overrides)
    engine = build_adapted(args, case, adapter_state(case))
    loss, norm = step(engine, args, make_samples(case, 8))
    return loss, norm, moved(engine)


def first_step(case: Case, split: tuple[int, int, int], trap: str | None, **overrides: Any) -> Any:
    return run_ranks(_first_step, split[0] * split[1] * split[2], case, split, overrides, trap)


def test_recomputed_layers_behind_a_frozen_embedding_learn() -> None:
    """Reentrant recomputation silently gives no gradients to a layer whose input requires none; the loss is right."""
    expected = first_step(GQA, (1, 1, 1), None, checkpoint_activations=False)[0]
    found = first_step(GQA, (1, 1, 1), None, recompute_layers=2)[0]
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert without_gradient([expected[2]]) == without_gradient([found[2]]) == []
    trapped = first_step(GQA, (1, 1, 1), "frozen input", recompute_layers=2)[0]
    assert trapped[0] == pytest.approx(expected[0], abs=1e-6)
    assert trapped[1] < 0.9 * expected[1]
    still = without_gradient([trapped[2]])
    assert {layer for layer, _, _ in still} == {2, 3}
    assert len(still) == 2 * 14  # both factors of seven projections, of the two layers


def test_no_gradient_is_expected_of_a_frozen_tied_embedding() -> None:
    keys = {"precision": "bfloat16", "checkpoint_activations": False}
    assert without_gradient([seen for *_, seen in first_step(TIED, (1, 2, 1), None, **keys)]) == []
    failed = run_ranks(
        _first_step, 2, TIED, (1, 2, 1), keys, "tied weights", timeout=60, grace=2.0, expect_failure=True
    )
    assert any("_hp_grad" in output for _, output in failed)


def test_a_stage_with_nothing_to_train_is_refused_on_all_ranks() -> None:
    """`type:` accepts any expression; one that matches only the norm puts all decoder layers on one stage."""
    keys = {"pipe_partition_method": "type:finalnorm"}
    refused = run_ranks(_first_step, 2, GQA, (1, 2, 1), keys, None, timeout=60, grace=2.0, expect_failure=True)
    for code, output in refused:
        assert code == 1
        assert "holds layers" in output
        assert "with lora it has nothing to train; write pipe_partition_method: type:transformer|mlp" in output
    trap = "a stage with nothing to train"
    trapped = run_ranks(_first_step, 2, GQA, (1, 2, 1), keys, trap, timeout=20, grace=2.0, expect_failure=True)
    assert any("optimizer got an empty parameter list" in output for _, output in trapped)
