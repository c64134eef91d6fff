"""The planner's time model: published arithmetic, the node's links, DeepSpeed's own schedule, and properties."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.published_runs import LLAMA_8B, LLAMA_70B
from megatron.layout import LlamaShape
from megatron.model.flops import megatron_flops_per_token, neox_flops_per_token
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.gpu_placement import coordinates
from megatron.planner.cost import compute, traffic
from megatron.planner.cost.estimate import Estimate, StageTime, estimate
from megatron.planner.cost.machines import FRONTIER, LUMI, MACHINES, Machine, cut_rate, ring_rate
from megatron.planner.cost.memory import default_stages
from megatron.planner.cost.parallel_layout import ParallelLayout, decoders_by_stage
from megatron.planner.cost.reliability import budget, reliability
from tests.support.configurations import keys

pytestmark = pytest.mark.unit

ASTROSAGE = ParallelLayout(tensor=8, pipe=8, data=32, micro_batch=1, num_micro_batches=16)


def planned(layout: ParallelLayout = ASTROSAGE, machine: Machine = FRONTIER, seq: int = 8192) -> Estimate:
    return estimate(LLAMA_70B, layout, seq, machine)


# --- hand arithmetic


@pytest.mark.parametrize(
    ("shape", "seq", "neox", "neox_recomputed", "megatron"),  # 1e11 FLOPs per token
    [
        (LLAMA_70B, 2048, 4.074, 5.432, 4.251),
        (LLAMA_70B, 4096, 4.235, 5.647, 4.331),
        (LLAMA_70B, 8192, 4.557, 6.076, 4.492),
        (LLAMA_8B, 8192, 0.539, 0.719, 0.515),
    ],
)
def test_flop_formulas(shape: LlamaShape, seq: int, neox: float, neox_recomputed: float, megatron: float) -> None:
    assert neox_flops_per_token(shape, seq, recomputed=False) / 1e11 == pytest.approx(neox, abs=6e-4)
    assert neox_flops_per_token(shape, seq, recomputed=True) / 1e11 == pytest.approx(neox_recomputed, abs=6e-4)
    assert megatron_flops_per_token(shape, seq) / 1e11 == pytest.approx(megatron, abs=6e-4)


def test_speed_at_50_tflops_depends_on_the_formula_by_a_third() -> None:
    assert 50e12 / neox_flops_per_token(LLAMA_70B, 8192, recomputed=True) == pytest.approx(82.3, abs=0.05)
    assert 50e12 / megatron_flops_per_token(LLAMA_70B, 8192) == pytest.approx(111.3, abs=0.05)


def test_parameters_of_a_stage() -> None:
    sizes = [stage.parameters for stage in planned().stages]
    assert sizes[1:7] == pytest.approx([1.070e9] * 6, rel=1e-3)
    assert [sizes[0], sizes[7]] == pytest.approx([1.201e9] * 2, rel=1e-3)
    whole = planned(ParallelLayout(1, 1, 1, 1, 1)).stages[0].parameters
    assert whole == LLAMA_70B.num_parameters == 70_553_706_496
    tied = replace(LLAMA_70B, tied=True)
    assert estimate(tied, ParallelLayout(1, 1, 1, 1, 1), 8192, FRONTIER).stages[0].parameters == tied.num_parameters


def test_executed_flops_of_a_micro_batch() -> None:
    """Ten layers of the 70B at TP8, causal, with recomputation: 7.56e13, with the backward counted as two forwards."""
    weights = sum(i * o for i, o in compute.layer_matrices(LLAMA_70B, 8))
    attention = compute.attention_flops(LLAMA_70B, ASTROSAGE, 8192)
    assert 10 * 4 * (2 * 8192 * weights + attention) == pytest.approx(7.56e13, rel=1e-3)


def test_time_of_a_layer_and_of_the_head() -> None:
    """By hand: per layer and GCD, 1.752e12 FLOPs of matrix products at 153 TFLOP/s and 1.374e11 of attention at 75
    (backward 2.5 times as many at 55); 6.455e12 of the head, forward and backward."""
    machine = replace(FRONTIER, sustained=1.0, hbm_rate=math.inf)  # arithmetic only
    forward, backward, again = compute.layer_seconds(LLAMA_70B, ASTROSAGE, 8192, machine)
    assert [forward.gemm, backward.gemm] == pytest.approx([11.453e-3, 22.906e-3], rel=1e-3)
    assert [forward.attention, backward.attention] == pytest.approx([1.8325e-3, 6.247e-3], rel=1e-3)
    assert again.total == pytest.approx(13.286e-3, rel=1e-3)
    nothing = compute.layer_seconds(LLAMA_70B, replace(ASTROSAGE, recompute="none"), 8192, machine)[2]
    assert nothing.total == 0
    selective = compute.layer_seconds(LLAMA_70B, replace(ASTROSAGE, recompute="selective"), 8192, machine)[2]
    assert selective.total == pytest.approx(1.8325e-3, rel=1e-3)
    assert compute.head_seconds(LLAMA_70B, ASTROSAGE, 8192, machine).total == pytest.approx(42.19e-3, rel=1e-3)


def test_bytes_of_elementwise_operations() -> None:
    """One token, h = 2, f = 5, two bytes per element. Forward: norms and additions 9 h = 18 elements, q and k read and
    written 8, SwiGLU 3 f = 15; backward: 8 h = 16, again 8, 5 f = 25."""
    tiny = LlamaShape(1, 2, 1, 1, 5, 8, 8, tied=False)
    assert compute.memory_bound_bytes(tiny, ParallelLayout(1, 1, 1, 1, 1), 1) == (82, 98)


def test_tensor_parallel_traffic_of_a_stage() -> None:
    stored = replace(ASTROSAGE, recompute="none")
    assert 10 * traffic.tensor_bytes_per_layer(LLAMA_70B, stored, 8192) == pytest.approx(9.4e9, rel=1e-2)
    recomputed = 10 * traffic.tensor_bytes_per_layer(LLAMA_70B, ASTROSAGE, 8192)
    assert recomputed == pytest.approx(14.1e9, rel=1e-2)
    assert recomputed / 75e9 == pytest.approx(0.19, abs=5e-3)
    assert recomputed / 39e9 == pytest.approx(0.36, abs=5e-3)
    # At 0.85 x 78 GB/s; the end stages have one more all-reduce of 134 MB: embedding output, head input gradient
    first, middle, last = (planned().stages[stage].tensor_parallel for stage in (0, 1, 7))
    assert middle == pytest.approx(212.6e-3, rel=1e-3)
    assert [first, last] == pytest.approx([216.1e-3] * 2, rel=1e-3)


def test_sequence_parallelism_has_ten_half_collectives_a_layer() -> None:
    """Eight without it; 117.4 MB each, a ring's share of 134.2 MB of hidden states; with recomputation four more."""
    for recompute, without, with_it in (("none", 8, 10), ("full", 12, 14)):
        layout = replace(ASTROSAGE, recompute=recompute)
        for sliced, halves in ((False, without), (True, with_it)):
            found = traffic.tensor_bytes_per_layer(LLAMA_70B, replace(layout, sequence_parallel=sliced), 8192)
            assert found == pytest.approx(halves * 7 / 8 * 134_217_728)
    alone = replace(ASTROSAGE, tensor=1, sequence_parallel=True)
    assert traffic.tensor_bytes_per_layer(LLAMA_70B, alone, 8192) == 0
    # 10 layers x 10 x 1.7713 ms at 0.85 x 78 GB/s; two for the embedding, three for the head
    stored = planned(replace(ASTROSAGE, recompute="none", sequence_parallel=True)).stages
    first, middle, last = (stored[stage].tensor_parallel for stage in (0, 1, 7))
    assert [first, middle, last] == pytest.approx([102 * 1.7713e-3, 100 * 1.7713e-3, 103 * 1.7713e-3], rel=1e-3)


def test_communication_that_products_can_hide() -> None:
    """A layer's half-collectives of 1.7713 ms overlap one each with the backward products of qkv, which are shorter,
    and of the MLP; without sequence parallelism, all-reduces of twice that overlap with weight gradients only."""
    layout = replace(ASTROSAGE, recompute="none")
    tokens, matrices = 8192, compute.layer_matrices(LLAMA_70B, 8)
    (h, qkv), (_, up_gate) = matrices[0], matrices[2]
    half = 1.7713e-3
    of_input, of_weight = (
        compute.gemm_seconds(tokens, qkv, h, FRONTIER),
        compute.gemm_seconds(h, tokens, qkv, FRONTIER),
    )
    assert max(of_input, of_weight) < half
    assert 2 * half < compute.gemm_seconds(h, tokens, up_gate, FRONTIER)
    sliced = planned(replace(layout, sequence_parallel=True))
    assert sliced.stages[1].hideable == pytest.approx(10 * (of_input + of_weight + 2 * half), rel=1e-3)
    assert planned(layout).stages[1].hideable == pytest.approx(10 * (of_weight + 2 * half), rel=1e-3)
    assert 0 < sliced.hideable_seconds < sliced.parts["tensor_parallel"] * sliced.waiting
    assert planned(ParallelLayout(1, 8, 32, 1, 16)).hideable_seconds == 0


def test_messages_between_stages() -> None:
    """DeepSpeed splits 134 MB over the tensor-parallel ranks and gathers them: input, own output, gradient.

    By hand: 2.84 ms there and back, with eight ranks of a node on four NICs of 23.6 GB/s; 1.77 ms per gather.
    """
    size = traffic.message_bytes(LLAMA_70B, ASTROSAGE, 8192)
    assert 8 * size == 134_217_728
    assert 8 * size / 24e9 == pytest.approx(5.6e-3, abs=5e-5)
    first, middle, last = (planned().stages[stage].messages for stage in (0, 1, 7))
    assert [first, middle, last] == pytest.approx([6.386e-3, 11.001e-3, 4.615e-3], rel=1e-3)
    split = planned(replace(ASTROSAGE, sequence_parallel=True)).stages
    assert split[1].messages == pytest.approx(5.687e-3, rel=1e-3)
    alone = ParallelLayout(1, 2, 8, 1, 4)  # each of a node's eight ranks sends the whole 134 MB
    assert planned(alone).stages[0].messages == pytest.approx(22.75e-3, rel=1e-3)


def test_deepspeed_splits_messages_by_default() -> None:
    from deepspeed.runtime.config import get_pipeline_config

    defaults = get_pipeline_config({})
    assert defaults["pipe_partitioned"]
    assert defaults["grad_partitioned"]
    args = NeoXArgs.from_dict(keys(), world_size=1)
    assert "pipeline" not in args.deepspeed_config
    sliced = NeoXArgs.from_dict(keys(model_parallel_size=2, sequence_parallel=True), world_size=2)
    assert get_pipeline_config(sliced.deepspeed_config) == defaults | {
        "pipe_partitioned": False,
        "grad_partitioned": False,
    }


def test_gradients_are_reduced_in_fp32() -> None:
    assert traffic.ring_bytes(32, 2 * 1.070e9) == pytest.approx(4.1e9, rel=2e-2)  # the bf16 of the planning sheet
    seconds = traffic.reduction_seconds(1.070e9, ASTROSAGE, FRONTIER)
    network = 0.85 * 11.8e9
    assert seconds == pytest.approx(2 * 31 / 32 * 4 * 1.070e9 / network, rel=2e-3)
    assert traffic.gather_seconds(1.070e9, ASTROSAGE, FRONTIER) == pytest.approx(seconds / 4, rel=2e-3)
    alone = replace(ASTROSAGE, data=1)
    assert traffic.reduction_seconds(1e9, alone, FRONTIER) == traffic.gather_seconds(1e9, alone, FRONTIER) == 0


def test_the_reduction_bucket_is_deepspeeds() -> None:
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE

    assert traffic.REDUCTION_BUCKET == MEMORY_OPT_ALLREDUCE_SIZE


@pytest.mark.parametrize(
    ("micro_batches", "virtual", "efficiency"),
    [
        (8, 1, 0.53),
        (16, 1, 0.70),
        (32, 1, 0.82),
        (64, 1, 0.90),
        (128, 1, 0.95),
        (16, 2, 0.82),
        (16, 5, 0.92),
        (32, 2, 0.90),
        (32, 5, 0.96),
    ],
)
def test_bubble(micro_batches: int, virtual: int, efficiency: float) -> None:
    """The formula's bubble; with virtual stages, the longer head and the messages change it by up to two points."""
    layout = replace(ASTROSAGE, num_micro_batches=micro_batches)
    if virtual == 1:
        assert 1 / (1 + planned(layout).bubble) == pytest.approx(efficiency, abs=6e-3)
    time = planned(replace(layout, engine="megatron", sequence_parallel=True, virtual_stages=virtual))
    assert 1 / (1 + time.bubble) == pytest.approx(efficiency, abs=6e-3 if virtual == 1 else 0.02)


def test_checkpoint() -> None:
    assert planned().checkpoint_bytes == pytest.approx(988e9, rel=1e-3)


def test_matrix_products_reach_the_published_range() -> None:
    """Isolated kernels: at best 147 TFLOP/s, at least 125 at the shapes of a tensor-parallel Llama."""
    machine = replace(FRONTIER, sustained=1.0)

    def rate(m: int, k: int, n: int) -> float:
        return 2 * m * k * n / compute.gemm_seconds(m, k, n, machine) / 1e12

    assert rate(8192, 8192, 8192) == pytest.approx(147, abs=1)
    for tensor in (1, 2, 4, 8):
        for features_in, features_out in compute.layer_matrices(LLAMA_70B, tensor):
            assert 125 < rate(8192, features_in, features_out) <= 149


# --- the node


def test_tensor_parallel_groups_on_the_links() -> None:
    """OLCF's binding puts a two-link bridge into both groups of four, LUMI's only one-link ones."""
    assert FRONTIER.gcds(range(4)) == (4, 5, 2, 3)
    assert FRONTIER.gcds(range(4, 8)) == (6, 7, 0, 1)
    for group in ((2, 3, 4, 5), (0, 1, 6, 7)):
        assert ring_rate(group) == 69.9e9  # one routed pair closes the ring
        assert cut_rate(group) == 77.1e9
    for group in ((0, 1, 2, 3), (4, 5, 6, 7)):
        assert LUMI.gcds(group) == group
        assert ring_rate(group) == 39.0e9
        assert cut_rate(group) == 78.0e9
    everyone = tuple(range(8))
    assert ring_rate(everyone) == 39.0e9
    assert cut_rate(everyone) == pytest.approx(77.1e9 + 3 * 39.0e9)  # two GCDs of a package against the rest
    for machine in (FRONTIER, LUMI):
        assert traffic.tensor_rate(replace(ASTROSAGE, tensor=2), machine) == pytest.approx(0.85 * 147.8e9)
        assert traffic.tensor_rate(ASTROSAGE, machine) == pytest.approx(0.85 * 78e9)
        assert traffic.tensor_rate(replace(ASTROSAGE, tensor=16), machine) == traffic.tensor_rate(ASTROSAGE, machine)


def test_where_stages_and_replicas_meet() -> None:
    small = ParallelLayout(1, 8, 2, 1, 320)  # four stages of two ranks on each of two nodes
    assert traffic.boundary_rate(0, small, LUMI) == 39.0e9  # ranks 0, 1 to 2, 3
    assert traffic.boundary_rate(1, small, LUMI) == 69.9e9  # 2, 3 to 4, 5: 2-4 has two links, 3-5 is routed
    assert traffic.boundary_rate(3, small, LUMI) == 23.6e9  # two ranks, a NIC each
    assert traffic.boundary_rate(0, ASTROSAGE, LUMI) == pytest.approx(11.8e9)
    assert traffic.wrap_rate(small, LUMI) == 23.6e9  # from the second node to the first
    assert traffic.wrap_rate(replace(small, pipe=4), LUMI) == 69.9e9  # ranks 6, 7 to 0, 1; its slowest boundary has 39
    inside = ParallelLayout(2, 1, 4, 1, 1)
    assert traffic.data_rate(inside, LUMI) == traffic.group_rate(LUMI, (0, 2, 4, 6))
    assert traffic.data_rate(replace(inside, data=64), LUMI) == pytest.approx(0.85 * 47.2e9)


def test_ranks_fill_nodes_as_the_launcher_numbers_them() -> None:
    """The model's neighbors, rank + 1 in a tensor group and rank + t d in the next stage, are those of the launcher."""
    t, p, d = 2, 4, 4
    for rank in range(t * p * d):
        pipe, data, tensor = coordinates(rank, p, d, t)
        assert rank == pipe * d * t + data * t + tensor


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_machine_is_whole(machine: Machine) -> None:
    assert sorted(machine.gcd_of_local_rank) == list(range(machine.gpus_per_node))
    assert 0 < machine.sustained <= 1
    assert machine.gemm_flops < machine.peak_flops


def test_the_hop_comes_from_huginns_slowdown() -> None:
    """108.75 TFLOP/s on 8 GCDs, about 58 on 4,096 (52-64), each with one sequence of 4,096 tokens and FLOPs like 32e9
    parameters; bf16 gradients of 3.5e9 parameters are reduced in buckets of 64 MB. Hops are the slowdown that waiting
    and bandwidth do not explain.
    """
    flops = 4096 * 6 * 32e9
    quick, slow = flops / 108.75e12, flops / 58e12
    one_node, all_nodes = (planned(ParallelLayout(1, 1, n, 1, 1)).waiting for n in (8, 4096))
    wire = traffic.ring_bytes(4096, 2 * 3.5e9) / traffic.data_rate(ParallelLayout(1, 1, 4096, 1, 1), FRONTIER)
    hops = 2 * 4095 * math.ceil(2 * 3.5e9 / 64e6)
    assert (slow / all_nodes - quick / one_node - wire) / hops == pytest.approx(FRONTIER.hop_seconds, rel=0.1)


# --- DeepSpeed


@pytest.mark.parametrize(
    ("layers", "pipe"), [(80, 8), (80, 16), (80, 32), (10, 4), (12, 5), (7, 2), (5, 4), (32, 7), (4, 1)]
)
def test_layers_are_assigned_as_in_deepspeed(layers: int, pipe: int) -> None:
    from deepspeed.runtime.utils import partition_balanced

    weights = [0, 0, *[1] * layers, 0, 0, 0]
    edges = partition_balanced(weights, pipe)
    assert decoders_by_stage(layers, pipe) == [sum(weights[a:b]) for a, b in itertools.pairwise(edges)]
    ours = [sum(2 <= index < layers + 2 for index in stage) for stage in default_stages(layers, pipe)]
    assert decoders_by_stage(layers, pipe) == ours


def simulate(times: list[tuple[float, float]], micro_batches: int) -> float:
    """Run DeepSpeed's own instructions on every stage; passes take `times` (forward, backward), messages no time."""
    from deepspeed.runtime.pipe import schedule

    stages = len(times)
    programs = [
        [command for step in schedule.TrainSchedule(micro_batches, stages, stage).steps() for command in step]
        for stage in range(stages)
    ]
    clock, position = [0.0] * stages, [0] * stages
    mail: dict[tuple[type, int], list[float]] = defaultdict(list)
    moved = True
    while moved:
        moved = False
        for stage, program in enumerate(programs):
            while position[stage] < len(program):
                command = program[position[stage]]
                match command:
                    case schedule.ForwardPass():
                        clock[stage] += times[stage][0]
                    case schedule.BackwardPass():
                        clock[stage] += times[stage][1]
                    case schedule.SendActivation() | schedule.SendGrad():
                        mail[type(command), stage].append(clock[stage])
                    case schedule.RecvActivation() | schedule.RecvGrad():
                        forward = isinstance(command, schedule.RecvActivation)
                        sender = (schedule.SendActivation, stage - 1) if forward else (schedule.SendGrad, stage + 1)
                        if not mail[sender]:
                            break
                        clock[stage] = max(clock[stage], mail[sender].pop(0))
                    case _:
                        pass
                position[stage] += 1
                moved = True
    assert position == [len(program) for program in programs]
    return max(clock)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 1), (4, 2), (4, 9), (8, 16), (8, 32)])
def test_pipeline_time_equals_that_of_deepspeeds_schedule(stages: int, micro_batches: int) -> None:
    layout = ParallelLayout(8, stages, 1, 1, micro_batches)
    time = planned(layout)
    totals = [stage.total for stage in time.stages]
    simulated = simulate([(total / 3, total * 2 / 3) for total in totals], micro_batches)
    assert time.pipeline_seconds == pytest.approx(simulated, rel=0.02)


def test_equal_stages_make_the_textbooks_bubble() -> None:
    assert simulate([(1.0, 2.0)] * 8, 16) == pytest.approx(3 * (16 + 7))


# --- properties

LAYOUTS = st.builds(
    ParallelLayout,
    tensor=st.sampled_from([1, 2, 3, 4, 8, 16]),
    pipe=st.sampled_from([1, 2, 4, 5, 7, 8, 16]),
    data=st.sampled_from([1, 2, 3, 8, 32, 128]),
    micro_batch=st.sampled_from([1, 2, 4]),
    num_micro_batches=st.integers(1, 64),
    recompute=st.sampled_from(["none", "selective", "full"]),
    sequence_parallel=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, st.sampled_from(list(MACHINES.values())))
def test_parts_are_positive_and_sum_to_the_step(layout: ParallelLayout, machine: Machine) -> None:
    time = planned(layout, machine)
    assert all(part >= 0 for part in time.parts.values())
    assert sum(time.parts.values()) == pytest.approx(time.step_seconds)
    work = time.pipeline_seconds + time.reduction_seconds + time.optimizer_seconds + time.gather_seconds
    assert time.step_seconds == pytest.approx(work * time.waiting)
    assert 0 < time.tflops_per_gcd["megatron"] < machine.peak_flops / 1e12
    assert time.tokens_per_second == pytest.approx(layout.global_batch * 8192 / time.step_seconds)


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_more_micro_batches_never_slow_a_token(layout: ParallelLayout) -> None:
    more = replace(layout, num_micro_batches=2 * layout.num_micro_batches)
    assert planned(more).tokens_per_second_per_gcd > planned(layout).tokens_per_second_per_gcd


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_recomputation_and_replicated_norms_cost_time(layout: ParallelLayout) -> None:
    none, selective, full = (
        planned(replace(layout, recompute=mode)).step_seconds for mode in ("none", "selective", "full")
    )
    assert none < selective < full
    without, with_it = (planned(replace(layout, sequence_parallel=sliced)) for sliced in (False, True))
    if layout.tensor == 1:
        assert with_it.step_seconds == without.step_seconds
    else:
        assert with_it.parts["tensor_parallel"] > without.parts["tensor_parallel"]
        assert with_it.parts["memory_bound"] < without.parts["memory_bound"]
        assert with_it.parts["pipeline_messages"] <= without.parts["pipeline_messages"]


@settings(max_examples=40, deadline=None)
@given(LAYOUTS, st.sampled_from(["gemm_flops", "hbm_rate", "sustained", "collective", "node_network_rate", "nic_rate"]))
def test_a_faster_machine_is_never_slower(layout: ParallelLayout, constant: str) -> None:
    faster = replace(FRONTIER, **{constant: 1.1 * getattr(FRONTIER, constant)})
    assert planned(layout, faster).step_seconds <= planned(layout).step_seconds


def test_the_slowest_stage_decides() -> None:
    """The head makes the last stage longer than a middle one, and a long stage delays all others."""
    time = planned()
    assert time.slowest is time.stages[-1]
    assert time.pipeline_seconds == pytest.approx(
        16 * time.stages[-1].total + sum(stage.total for stage in time.stages[:-1])
    )
    uneven = estimate(LLAMA_70B, ASTROSAGE, 8192, FRONTIER, layers=[10, 10, 10, 10, 20, 6, 7, 7])
    assert uneven.slowest is uneven.stages[4]
    assert uneven.pipeline_seconds > 1.5 * time.pipeline_seconds


def test_waiting_for_the_slowest_of_all_grows_slowly() -> None:
    assert planned(ParallelLayout(1, 1, 1, 1, 1)).waiting == 1.0
    assert planned().waiting == pytest.approx(1 + 0.02 * math.sqrt(2 * math.log(2048)))


def test_accumulation_is_paid_for_every_micro_batch() -> None:
    """Zeroing, converting and adding moves 20 bytes per parameter through HBM, for each of the 16 micro-batches."""
    stage: StageTime = planned().stages[1]
    assert stage.accumulation == pytest.approx(1.070e9 * 20 / (1.35e12 * FRONTIER.sustained), rel=1e-3)


# --- saves, failures, budgets


def test_the_save_interval_loses_least() -> None:
    time = planned()
    found = reliability(time)
    assert found.mean_time_to_interrupt == pytest.approx(10_000 / 256 * 3600)

    def lost(interval: float) -> float:
        return found.save_seconds / interval + (interval / 2 + 1200) / found.mean_time_to_interrupt

    least = min(range(60, 20_000), key=lost)
    assert found.save_interval == pytest.approx(least, abs=1)
    assert found.lost_to_saves + found.lost_to_failures == pytest.approx(lost(found.save_interval))
    quick = reliability(time, blocked_seconds=1.0)
    assert quick.save_interval < found.save_interval
    assert quick.useful > found.useful


def test_budget() -> None:
    time = planned()
    plan = budget(time, 10e9)
    assert plan.steps == math.ceil(10e9 / (512 * 8192))
    assert plan.node_hours == pytest.approx(plan.days * 24 * 256)
    assert plan.days > plan.steps * time.step_seconds / 86_400


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from megatron.planner import search; from megatron.planner.cost import estimate, machines; "
        "assert 'torch' not in sys.modules, 'torch'; assert 'numpy' not in sys.modules, 'numpy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
