"""Links between stages: every pair once, one partner at a time, messages of the training's size; and the report."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from megatron.neox_arguments import NeoXArgs
from megatron.parallel.gpu_placement import Seat, coordinates
from megatron.parallel.neighbors import neighbor_rounds
from megatron.preflight.diagnosis import Roster
from megatron.preflight.stage_links import (
    communicator_line,
    stage_link_lines,
    stage_link_rate,
    stage_message_bytes,
    stage_rounds,
)
from tests.support.configurations import keys
from tests.support.ranks import RankFailure, run_ranks

LAYOUT = {"model_parallel_size": 8, "pipe_parallel_size": 8, "num_layers": 16, "num_kv_heads": 8, "num_gpus": 8}
CPU = torch.device("cpu")


def configuration(world_size: int = 2048, **changes: Any) -> NeoXArgs:
    more = {"num_nodes": world_size // 8, "gradient_accumulation_steps": 8}
    return NeoXArgs.from_dict(keys(**LAYOUT | more | changes), world_size)


@pytest.mark.unit
def test_messages_of_the_70b_are_16_8_mb() -> None:
    """Without sequence parallelism they are 134 MB from every rank, which DeepSpeed splits."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "seq_length": 8192, "precision": "bfloat16"}
    sizes |= {"train_micro_batch_size_per_gpu": 1, "max_position_embeddings": 8192}
    assert stage_message_bytes(configuration(**sizes, sequence_parallel=True)) == 16_777_216
    assert stage_message_bytes(configuration(**sizes)) == 16_777_216
    assert stage_message_bytes(configuration(**sizes, engine="megatron")) == 134_217_728


@pytest.mark.unit
@pytest.mark.parametrize(("pipe", "closed"), [(2, False), (2, True), (3, True), (5, False), (8, False), (8, True)])
def test_every_pair_of_neighbors_meets_once_and_alone(pipe: int, closed: bool) -> None:
    rounds = neighbor_rounds(pipe, 4, closed)
    for pairs in rounds:
        members = list(chain(*pairs))
        assert len(members) == len(set(members))
    following = {(stage, (stage + 1) % pipe) for stage in range(pipe if closed else pipe - 1)}
    expected = sorted((a * 4 + n, b * 4 + n) for a, b in following for n in range(4))
    assert sorted(chain(*rounds)) == expected


@pytest.mark.unit
def test_virtual_stages_close_the_ring() -> None:
    plain = stage_rounds(configuration(engine="megatron"))
    closed = stage_rounds(configuration(engine="megatron", virtual_pipe_parallel_size=2))
    assert sum(map(len, closed)) - sum(map(len, plain)) == 256
    assert (2047, 255) in closed[1]
    two = stage_rounds(configuration(16, pipe_parallel_size=2, engine="megatron", virtual_pipe_parallel_size=2))
    assert two == [[(rank, rank + 8) for rank in range(8)]]  # both directions at once
    assert stage_rounds(configuration(64, pipe_parallel_size=1)) == []


@pytest.mark.unit
def test_slow_pairs_are_named() -> None:
    roster, sizes = Roster(2048), (8, 32, 8)
    roster.sizes = sizes
    roster.seats.update(
        {rank: Seat(rank, f"n{rank // 8}", rank % 8, *coordinates(rank, *sizes)) for rank in range(2048)}
    )
    rates = dict.fromkeys(chain(*neighbor_rounds(8, 256, True)), 11e9)
    lines = stage_link_lines(rates, 16_777_216, roster, torch.device("cuda", 0), over_links=True)
    assert lines[0].startswith("neighboring stages: 2048 pairs, 16.8 MB both ways at once over directed links, right")
    assert len(lines) == 1
    rates[3, 259] = 2e9
    lines = stage_link_lines(rates, 16_777_216, roster, torch.device("cuda", 0), over_links=True)
    assert lines[1:] == [
        "slow link: rank 3 on n0 (pipe 0, data 0, tensor 3) and rank 259 on n32 (pipe 1, data 0, tensor 3), 0.18 of "
        "the median"
    ]
    for pair in list(rates)[100:120]:
        rates[pair] = 1e9
    assert stage_link_lines(rates, 1, roster, torch.device("cuda", 0), True)[-1] == "and 13 more slow links"


@pytest.mark.unit
def test_what_a_communicator_takes_is_said() -> None:
    assert communicator_line([None, None], 4).endswith("takes no device memory on CPUs")
    line = communicator_line([300 << 20, 200 << 20, 400 << 20, None], 4)
    assert "takes 300 MiB of device memory (min 200, max 400); a rank has 4 to its neighbors" in line


def _exchange(rank: int, world_size: int, fault: str) -> list[float]:
    import torch.distributed as dist

    from megatron.engine.mcore_groups import EngineGroups
    from megatron.parallel.process_groups import form_groups
    from megatron.preflight import stage_links

    layout = {"model_parallel_size": 1, "pipe_parallel_size": 3, "num_layers": 6, "num_gpus": 3}
    more = {"engine": "megatron", "virtual_pipe_parallel_size": 2, "gradient_accumulation_steps": 3}
    args = NeoXArgs.from_dict(keys(**layout | more), world_size)
    links: Any = EngineGroups.make(form_groups(args), False, True, 1).links
    if fault == "changed" and rank == 1:
        send = dist.isend
        stage_links.dist.isend = lambda tensor, *rest, **more: send(tensor + 1, *rest, **more)  # type: ignore[assignment]
    pairs = [next((pair for pair in pairs if rank in pair), None) for pairs in stage_rounds(args)]
    ways = [links] if fault == "changed" else [None, links]
    return [stage_link_rate(pair, rank, 4096, CPU, way) for way in ways for pair in pairs if pair]


@pytest.mark.distributed
def test_messages_go_over_the_engines_links_or_the_world() -> None:
    """Three stages in a ring have two partners each, in both directions."""
    rates = run_ranks(_exchange, 3, "none")
    assert [len(found) for found in rates] == [4, 4, 4]
    assert all(rate > 0 for found in rates for rate in found)


@pytest.mark.distributed
def test_a_message_that_arrives_changed_is_an_error() -> None:
    with pytest.raises(RankFailure, match="1024 of 1024 elements sent by rank 1 arrived with wrong values"):
        run_ranks(_exchange, 3, "changed")


@pytest.mark.unit
def test_a_link_to_someone_else_is_an_error() -> None:
    from megatron.engine.mcore_groups import Link, Links

    nobody: Any = None
    elsewhere = Links(hidden_out=Link(nobody, 5), gradient_in=Link(nobody, 5))
    with pytest.raises(RuntimeError, match="rank 0's links lead to 5 and 5, not to 1"):
        stage_link_rate((0, 1), 0, 4096, CPU, elsewhere)
