"""The memory of a layout: arithmetic for the 70B by hand, published formulas, and the moments of peak memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.layout import LlamaShape
from megatron.planner.cost.activations import Activations
from megatron.planner.cost.checkpoint_size import checkpoint_size
from megatron.planner.cost.machines import GIB
from megatron.planner.cost.memory import StageMemory, communicators, default_stages, plan_memory
from megatron.planner.cost.parallel_layout import ParallelLayout

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
LLAMA_70B = LlamaShape(
    num_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_kv_heads=8,
    intermediate_size=28672,
    vocab_size=128256,
    padded_vocab_size=128256,
    tied=False,
)
ASTROSAGE = ParallelLayout(tensor=8, pipe=8, data=32, micro_batch=1, num_micro_batches=16)
SEQ = 8192


def plan(layout: ParallelLayout = ASTROSAGE, precision: str = "bfloat16", **keys: bool) -> list[StageMemory]:
    return plan_memory(LLAMA_70B, layout, SEQ, precision, **keys)


def test_parameters_of_the_70b_per_gcd() -> None:
    """By hand; all ranks together hold the 70,553,706,496 of the model card, with norms once per TP rank."""
    stages = plan()
    sizes = [stage.parameters for stage in stages]
    assert sizes == [1_201_045_504, *[1_069_711_360] * 6, 1_201_053_696]
    norms = 161 * 8192
    assert 8 * sum(sizes) - 7 * norms == 70_553_706_496
    assert sum(stage.decoder_layers for stage in stages) == 80


def test_state_of_the_70b_is_the_sum_made_by_hand() -> None:
    """2 bytes of weight, 2 + 4 of gradient, 12 / 32 of master and moments: 9.0 GB, and 10.1 GB at the ends."""
    middle, end = plan()[3], plan()[7]
    assert (middle.weights + middle.gradients + middle.optimizer) / 1e9 == pytest.approx(9.0, abs=0.05)
    assert (end.weights + end.gradients + end.optimizer) / 1e9 == pytest.approx(10.1, abs=0.05)
    assert middle.weights / 1e9 == pytest.approx(2.14, abs=0.005)
    assert middle.gradients / 1e9 == pytest.approx(2.14 + 4.28, abs=0.01)
    assert middle.optimizer / 1e9 == pytest.approx(0.40, abs=0.005)


def test_full_recomputation_stores_layer_inputs_of_eight_micro_batches() -> None:
    """134.2 MB each, 10 layers, 8 micro-batches: 10.74 GB; an eighth of an output, 16.8 MB, and 0.2 MB of ids each."""
    assert plan()[0].activations / 1e9 == pytest.approx(10.74 + 8 * 0.0170, abs=0.005)


def test_a_stored_layer_lies_between_the_published_counts() -> None:
    """34 s b h with everything fused (Korthikanti et al. 2022, and counted for Llama), 40.5 if SiLU is stored, too."""
    alone = ParallelLayout(tensor=1, pipe=1, data=1, micro_batch=1, num_micro_batches=1)
    stored = Activations.of(LLAMA_70B, alone, SEQ, 2, "kernels", documents=False).stored_by_layer("none")
    assert 33.5 < stored / (SEQ * 8192) < 40.5
    # 5 h of norms, residuals and attention, 19,456 of q, k and v, 86,016 of the MLP, two bytes each; and fp32 sums
    assert stored / (SEQ * 8192) == pytest.approx(35.78, abs=0.01)


def test_storing_everything_does_not_fit_without_sequence_parallelism() -> None:
    """By hand 69.8 GB with (10 + 24 / t) s b h, 22.8 to 27 GB with sequence parallelism."""
    stored = plan(replace(ASTROSAGE, recompute="none"))[0]
    assert 60e9 < stored.activations < 75e9
    sliced = plan(replace(ASTROSAGE, recompute="none", sequence_parallel=True))[0]
    assert 22e9 < sliced.activations < 27e9


def test_one_forward_one_backward_bounds_what_is_in_flight() -> None:
    """min(m, p - stage) micro-batches (Narayanan et al. 2021), each as large as on the other stages: two on stage 6."""
    two = plan()[6].activations
    assert [2 * stage.activations / two for stage in plan()[1:7]] == [7, 6, 5, 4, 3, 2]
    # Fewer micro-batches than stages: the peak is in the second backward pass, with gradients of the first and three
    # micro-batches in memory.
    few = plan(replace(ASTROSAGE, num_micro_batches=4))
    assert [2 * stage.activations / two for stage in few[1:7]] == [3, 3, 3, 3, 3, 2]


@pytest.mark.parametrize("v", [2, 5])
def test_interleaving_multiplies_the_first_stage_by_its_published_factor(v: int) -> None:
    """1 + (p - 1) / (p v) (Megatron-LM's theoretical_memory_usage)."""
    layout = replace(ASTROSAGE, num_micro_batches=64, engine="megatron")
    plain, interleaved = plan(layout)[0], plan(replace(layout, virtual_stages=v))[0]
    assert interleaved.activations / plain.activations == pytest.approx(1 + 7 / (8 * v), rel=1e-4)  # ids


def test_the_last_stage_holds_the_logits_of_one_micro_batch() -> None:
    """8,192 tokens x 16,032 columns in bf16."""
    assert plan()[7].logits == 262_668_288
    assert all(stage.logits == 0 for stage in plan()[:7])


def test_fp32_shards_the_same_and_has_no_second_gradient() -> None:
    for stage in plan(precision="fp32"):
        assert stage.gradients <= 4 * stage.parameters
        assert stage.weights == pytest.approx(4 * stage.parameters, rel=1e-6)


def test_gradients_of_a_small_stage_are_copied_for_their_reduction() -> None:
    """DeepSpeed reduces up to 500 million elements together, in a copy; a larger flat tensor is reduced in place."""
    small = replace(LLAMA_70B, num_layers=8)
    layout = replace(ASTROSAGE, pipe=8, recompute="full")
    middle = plan_memory(small, layout, 128)[3]
    assert middle.parameters < 500_000_000
    assert middle.moment == "reduction"
    assert middle.workspace == pytest.approx(4 * middle.parameters, rel=1e-6)
    large = plan_memory(LLAMA_70B, layout, 128)[3]
    assert large.parameters > 500_000_000
    assert large.moments["reduction"] < large.allocated


def test_communicators_of_a_middle_rank() -> None:
    """World, tensor, data, gradient norm, pipeline, two neighbors: 1 GiB for the first, about 0.65 GiB per further."""
    assert [communicators(ASTROSAGE, stage) for stage in range(8)] == [6, 7, 7, 7, 7, 7, 7, 6]
    assert plan()[1].communicators / GIB == pytest.approx(1 + 0.65 * 6, rel=0.03)
    alone = ParallelLayout(tensor=1, pipe=1, data=1, micro_batch=1, num_micro_batches=1)
    assert plan_memory(LLAMA_70B, alone, SEQ)[0].communicators == 0
    assert plan_memory(LLAMA_70B, ASTROSAGE, SEQ, ops="cpu")[1].communicators == 0


def test_kinds_add_up_to_the_fullest_moment() -> None:
    for stage in [*plan(), *plan(replace(ASTROSAGE, recompute="none")), *plan(precision="fp32")]:
        assert stage.peak == sum(stage.by_kind.values())
        assert stage.allocated == max(stage.moments.values()) == stage.moments[stage.moment]


def test_layers_that_do_not_divide_go_to_the_first_stages() -> None:
    assert default_stages(80, 8) == [
        range(0, 12),
        *[range(2 + 10 * s, 12 + 10 * s) for s in range(1, 7)],
        range(72, 85),
    ]
    assert default_stages(5, 2) == [range(0, 5), range(5, 10)]
    assert default_stages(4, 1) == [range(0, 9)]


def test_heads_that_cannot_be_split_are_an_error() -> None:
    with pytest.raises(ValueError, match="model_parallel_size 16 does not divide num_kv_heads 8"):
        plan(replace(ASTROSAGE, tensor=16))


def test_a_checkpoint_of_the_70b_is_988_gb() -> None:
    size = checkpoint_size(LLAMA_70B, ASTROSAGE.tensor, "bfloat16")
    assert size.weights / 1e9 == pytest.approx(141, abs=0.5)
    assert size.optimizer / 1e9 == pytest.approx(847, abs=0.5)
    assert size.total / 1e9 == pytest.approx(988, abs=0.5)


def test_the_planner_needs_no_torch() -> None:
    program = (
        "import sys, megatron.planner.plan, megatron.planner.search, megatron.planner.front.report; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()
    assert "deepspeed" not in done.stdout.split()
