"""A flipped bit of one parameter on one rank stops the run, which names the tensor, the rank and its node."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.parallel.rank_env import node_name
from megatron.supervision.replicas import bit_sum, differences
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks
from tests.support.runs import run_case
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
NODE = node_name(os.environ)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    """Including sign bits, bits of zeros, and bits of the last element."""
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 0] = 0
    before = int(bit_sum(tensor))
    whole = tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])
    for place in (0, 17, 34):
        for bit in range(8 * tensor.element_size()):
            flipped = whole.clone()
            flipped.view(-1)[place] ^= -(2**bit) if bit == 8 * tensor.element_size() - 1 else 2**bit
            assert int(bit_sum(flipped.view(dtype))) != before, (place, bit)
    assert int(bit_sum(tensor.t().contiguous().t())) == before


def test_the_deviating_replica_is_found() -> None:
    """Two groups; three of four agree in the first, two differ in the second."""
    held = {0: 5, 1: 5, 2: 6, 3: 5}
    told: list[Any] = [[((0, 1, 2, 3), {"norm": held[rank]})] for rank in range(4)]
    told += [[((4, 5), {"norm": rank, "other": 1})] for rank in (4, 5)]
    assert list(differences(told)) == [("norm", (2,), (0, 1, 3)), ("norm", (5,), (4,))]


def _run(rank: int, world_size: int, run_keys: dict[str, Any], flip: dict[str, Any]) -> tuple[str, list[str]]:
    """A run in which one bit of one rank's parameter flips after an optimizer step; (its error, guilty nodes)."""
    from megatron.supervision.replicas import ReplicasDifferError
    from megatron.trainer.run import Run

    class Flipped(Run):
        def train_step(self) -> None:
            super().train_step()
            if self.state.iteration == flip["iteration"] and rank == flip["rank"]:
                layers = [*self.engine.numbered_layers(), *self.engine.tied_copies()]
                named = (pair for _, layer in layers for pair in layer.named_parameters(prefix=type(layer).__name__))
                parameter = next(p for name, p in named if flip["tensor"] in name)
                parameter.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    try:
        run_case(CASE, world_size, run_keys, Flipped)
    except ReplicasDifferError as error:
        return str(error), error.nodes
    return "", []


def keys(data: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "train_data_paths": [data],
        "train_iters": 6,
        "save": str(folder),
        "extra_save_iters": [6],
        "replica_check_interval": 2,
        **changes,
    }


@pytest.mark.parametrize(
    ("split", "rank", "tensor", "said"),
    [
        ((2, 1), 1, "layernorm", f"rank 0 on {NODE} (pipe 0, data 0, tensor 0)"),  # TP: only norms are replicated
        ((1, 2), 1, "dense", f"rank 1 on {NODE} (pipe 0, data 1, tensor 0)"),
        ((1, 1), 2, "linear", f"rank 2 on {NODE} (pipe 0, data 2, tensor 0) differs from that on ranks 0, 1, 3"),
    ],
    ids=["tensor", "pipeline", "data"],
)
def test_a_flipped_bit_stops_the_run(
    data: str, tmp_path: Path, split: tuple[int, int], rank: int, tensor: str, said: str
) -> None:
    tp, pp = split
    run_keys = keys(data, tmp_path, model_parallel_size=tp, pipe_parallel_size=pp)
    world = 2 if tp == 2 else 4
    outcome = run_ranks(_run, world, run_keys, {"iteration": 4, "rank": rank, "tensor": tensor})
    assert outcome == [outcome[0]] * world
    message, nodes = outcome[0]
    assert message.startswith("iteration 4: replicated parameters have diverged: layer ")
    assert tensor in message
    assert said in message
    assert nodes == ([NODE] if world == 4 and pp == 1 else []), "of two, nobody can say who is right"
    assert list(tmp_path.glob("global_step*")) == []


def test_shards_may_differ(data: str, tmp_path: Path) -> None:
    """Without data parallelism, a tensor-parallel shard of a matrix has no replica."""
    flip = {"iteration": 4, "rank": 1, "tensor": "linear"}
    assert run_ranks(_run, 2, keys(data, tmp_path, model_parallel_size=2), flip) == [("", [])] * 2


def test_nothing_that_differs_is_saved(data: str, tmp_path: Path) -> None:
    """The check before a save finds a deviation since the last regular check; without it the deviation is saved."""
    flip = {"iteration": 6, "rank": 1, "tensor": "layernorm"}
    run_keys = keys(data, tmp_path, model_parallel_size=2, replica_check_interval=100)
    assert "iteration 6" in run_ranks(_run, 2, run_keys, flip)[0][0]
    assert list(tmp_path.glob("global_step*")) == []
    assert run_ranks(_run, 2, run_keys | {"replica_check_interval": 0}, flip) == [("", [])] * 2
    assert [path.name for path in tmp_path.glob("global_step*")] == ["global_step6"]


def test_a_tied_embedding_is_compared_between_stages(data: str, tmp_path: Path) -> None:
    run_keys = keys(data, tmp_path, pipe_parallel_size=2, no_weight_tying=False)
    outcome = run_ranks(_run, 2, run_keys, {"iteration": 4, "rank": 1, "tensor": "embed"})
    assert "tied embedding on rank 1 on" in outcome[0][0] or "tied embedding on rank 0 on" in outcome[0][0]
