"""The groups of 2,048 ranks, and the report on their sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.neox_arguments import NeoXArgs
from megatron.parallel.gpu_placement import Seat, coordinates
from megatron.preflight.diagnosis import Roster
from megatron.preflight.groups import judge_sums, layout_groups, layout_sizes, payload_bytes
from tests.support.configurations import keys

pytestmark = pytest.mark.unit

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def configuration(**changes: Any) -> NeoXArgs:
    layout = {"model_parallel_size": 8, "pipe_parallel_size": 8, "num_layers": 8, "num_kv_heads": 8}
    return NeoXArgs.from_dict(keys(**layout | {"num_nodes": 256, "num_gpus": 8} | changes), 2048)


@pytest.mark.parametrize(("kind", "axis", "count"), [("TP", "model", 256), ("PP", "pipe", 256), ("DP", "data", 64)])
def test_groups_are_deepspeed_s(kind: str, axis: str, count: int) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    groups = layout_groups(configuration())[kind]
    topology = PipeModelDataParallelTopology(num_pp=8, num_mp=8, num_dp=32)
    assert sorted(group.ranks for group in groups) == sorted(map(tuple, topology.get_axis_comm_lists(axis)))
    assert len({group.name for group in groups}) == count


def test_groups_are_named_by_what_their_ranks_share() -> None:
    names = {group.name: group.ranks for kind in layout_groups(configuration()).values() for group in kind}
    assert names["TP group (pipe 7, data 31)"] == tuple(range(2040, 2048))
    assert names["PP group (data 31, tensor 7)"] == tuple(range(255, 2048, 256))
    assert names["DP group (pipe 7, tensor 7)"] == tuple(range(1799, 2048, 8))
    assert names["world group"] == tuple(range(2048))


def test_payloads_are_training_messages_up_to_a_limit() -> None:
    args = configuration(seq_length=512, train_micro_batch_size_per_gpu=2)
    assert payload_bytes(args, "TP", GPU) == 2 * 512 * 128 * 4
    assert payload_bytes(args, "DP", GPU) == 4 * args.shape.num_parameters // 64
    assert payload_bytes(configuration(hidden_size=8192, intermediate_size=28672), "DP", GPU) == 128 << 20
    assert payload_bytes(configuration(hidden_size=8192, intermediate_size=28672), "DP", CPU) == 1 << 20


def test_the_slowest_group_and_the_wrong_one_are_named() -> None:
    args = configuration()
    roster = Roster(2048)
    roster.sizes = layout_sizes(args)
    roster.seats.update(
        {rank: Seat(rank, f"n{rank // 8}", rank % 8, *coordinates(rank, *layout_sizes(args))) for rank in range(2048)}
    )
    outcomes = [{"wrong": 0, "elements": 1024, "seconds": 1e-3} for _ in range(2048)]
    outcomes[77]["seconds"] = 2e-3
    text, wrong = judge_sums(layout_groups(args)["TP"], roster, outcomes, 8 * 10**6)
    # A ring of eight carries 2 x 7/8 of the payload over each link.
    assert "TP groups: 256 of 8 ranks" in text
    assert "median 14, min 7, max 14, slowest (pipe 0, data 9) ranks 72-79 on n9" in text
    assert wrong == []
    outcomes[77]["wrong"] = 5
    _, wrong = judge_sums(layout_groups(args)["TP"], roster, outcomes, 4096)
    assert wrong == [
        "  TP group (pipe 0, data 9), ranks 72-79 on n9: wrong sums on rank 77, in up to 5 of 1024 elements"
    ]
