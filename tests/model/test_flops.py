"""FLOPs with an adapter: frozen weights have no weight gradients, the adapter has all passes."""

from __future__ import annotations

import pytest

from megatron.layout import PROJECTIONS, LlamaShape, adapted, adapter_alone, trained_rows
from megatron.model.flops import megatron_flops_per_token, neox_flops_per_token
from megatron.planner.cost.compute import TrainedElements
from megatron.planner.cost.estimate import estimate
from megatron.planner.cost.machines import FRONTIER
from megatron.planner.cost.parallel_layout import ParallelLayout

pytestmark = pytest.mark.unit

LLAMA_70B = LlamaShape(80, 8192, 64, 8, 28_672, 128_256, 128_256, tied=False)
EVERY = tuple(PROJECTIONS)


def test_frozen_weights_count_four_times_and_the_adapter_six() -> None:
    """161,792 parameters per layer and unit of rank: the in and out features of the seven projections, summed."""
    seq, shape = 8192, adapted(LLAMA_70B, 16, EVERY)
    assert adapter_alone(LLAMA_70B, 16, EVERY).num_parameters == 161_792 * 16 * 80
    whole = megatron_flops_per_token(LLAMA_70B, seq)
    attention = 6.0 * 80 * seq * 8192
    expected = (whole - attention) * 4 / 6 + attention + 6.0 * 161_792 * 16 * 80
    assert megatron_flops_per_token(shape, seq) == pytest.approx(expected, rel=1e-12)
    assert neox_flops_per_token(shape, seq, 1.0) == pytest.approx(neox_flops_per_token(LLAMA_70B, seq, 1.0) * 3 / 4)


def test_a_shape_without_an_adapter_trains_all_of_its_rows() -> None:
    assert trained_rows(LLAMA_70B) == LLAMA_70B.table
    assert len(trained_rows(adapted(LLAMA_70B, 4, ("q_proj",)))) == 2


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_planner_leaves_out_what_frozen_weights_do_not_cost(sequence_parallel: bool) -> None:
    """A step is shorter than when training all weights, and longer than two of its three passes."""
    layout = ParallelLayout(8, 2, 2, 1, 32, recompute="full", sequence_parallel=sequence_parallel)
    full, lora = (estimate(s, layout, 8192, FRONTIER) for s in (LLAMA_70B, adapted(LLAMA_70B, 16, EVERY)))
    assert 0.6 * full.step_seconds < lora.step_seconds < 0.95 * full.step_seconds
    assert lora.parts["gradient_reduction"] < 0.02 * full.parts["gradient_reduction"]
    assert lora.parts["optimizer"] < 0.02 * full.parts["optimizer"]
    trained = TrainedElements.of(adapted(LLAMA_70B, 16, EVERY), 1)
    assert (trained.layer, trained.vocabulary, trained.final_norm) == (161_792 * 16, 0, 0)
