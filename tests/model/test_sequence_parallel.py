"""Matrix products with gathered and scattered sequences equal plain torch; number and order of their collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SEQ, BATCH, IN, OUT, ROWS = 8, 3, 6, 12, 20


def _slice(x: Tensor, dim: int) -> Tensor:
    """This rank's slice of the sequence, with its own gradient."""
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone().requires_grad_()


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _difference(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def _against_torch(rank: int, world_size: int) -> dict[str, float]:
    """Largest difference of each module's output and gradients from those of the whole matrix."""
    from megatron.model.sequence_parallel import GatherLinear, ScatterEmbedding, ScatterLinear

    # Column-parallel products of gathered input, with the sequence in either dimension.
    group, found = dist.group.WORLD, {}
    for dim, shape in ((0, (SEQ, BATCH)), (1, (BATCH, SEQ))):
        x, weight = _drawn(*shape, IN, seed=1).requires_grad_(), _drawn(OUT, IN, seed=2).requires_grad_()
        whole = F.linear(x, weight)
        grad = _drawn(*whole.shape, seed=3)
        whole.backward(grad)
        column = GatherLinear(IN, OUT, group, torch.float64, dim)
        column.weight.data = weight.detach().chunk(world_size)[rank]
        own = _slice(x.detach(), dim)
        part = column(own)
        part.backward(grad.chunk(world_size, -1)[rank])
        found[f"column {dim}"] = max(
            _difference(part, whole.chunk(world_size, -1)[rank]),
            _difference(own.grad, x.grad.chunk(world_size, dim)[rank]),
            _difference(column.weight.grad, weight.grad.chunk(world_size)[rank]),
        )
    # A row-parallel product with a scattered output.
    x, weight = _drawn(SEQ, BATCH, OUT, seed=4).requires_grad_(), _drawn(IN, OUT, seed=5).requires_grad_()
    whole = F.linear(x, weight)
    grad = _drawn(*whole.shape, seed=6)
    whole.backward(grad)
    row = ScatterLinear(OUT, IN, group, torch.float64)
    row.weight.data = weight.detach().chunk(world_size, 1)[rank].contiguous()
    own = x.detach().chunk(world_size, -1)[rank].clone().requires_grad_()
    part = row(own)
    part.backward(grad.chunk(world_size)[rank])
    found["row"] = max(
        _difference(part, whole.chunk(world_size)[rank]),
        _difference(own.grad, x.grad.chunk(world_size, -1)[rank]),
        _difference(row.weight.grad, weight.grad.chunk(world_size, 1)[rank]),
    )
    # The embedding, scattered over the sequence; its input must stay unchanged.
    ids = torch.randint(ROWS, (BATCH, SEQ), generator=torch.Generator().manual_seed(7))
    before = ids.clone()
    weight = _drawn(ROWS, IN, seed=8).requires_grad_()
    whole = F.embedding(ids, weight)
    grad = _drawn(*whole.shape, seed=9)
    whole.backward(grad)
    embedding = ScatterEmbedding(ROWS, IN, group, torch.float64)
    embedding.weight.data = weight.detach().chunk(world_size)[rank]
    part = embedding(ids)
    part.backward(grad.chunk(world_size, 1)[rank])
    assert torch.equal(ids, before)
    found["embedding"] = max(
        _difference(part, whole.chunk(world_size, 1)[rank]),
        _difference(embedding.weight.grad, weight.grad.chunk(world_size)[rank]),
    )
    return found


def test_outputs_and_gradients_are_those_of_the_whole_matrices() -> None:
    for found in run_ranks(_against_torch, 4):
        assert set(found) == {"column 0", "column 1", "row", "embedding"}
        assert max(found.values()) < 1e-12, found


class _Events:
    """Names of collectives as they are launched and waited for, and of matrix products, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        for kind in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            self._watch(kind)

    def _watch(self, kind: str) -> None:
        original, events = getattr(dist, kind), self

        def launched(*args: Any, **kwargs: Any) -> Any:
            events.names.append(kind)
            work = original(*args, **kwargs)
            return work if work is None else _Waited(work, kind)

        class _Waited:
            def __init__(self, work: Any, kind: str) -> None:
                self.work, self.kind = work, kind

            def wait(self) -> None:
                events.names.append(f"end of {self.kind}")
                self.work.wait()

        setattr(dist, kind, launched)


def _layer(sequence_parallel: bool) -> tuple[Any, Tensor]:
    """A decoder layer and its input on this rank."""
    from megatron.model.llama import TransformerLayer
    from megatron.model.parallel import TensorParallel
    from megatron.model.rotary import RotaryTable
    from tests.support.models import Case

    world_size = dist.get_world_size()
    case = Case(heads=4, kv_heads=2, head_dim=8, intermediate=48, seq=16)
    args = case.neox(model_parallel_size=world_size, world_size=world_size, sequence_parallel=sequence_parallel)
    group = dist.group.WORLD
    assert group is not None
    tp = TensorParallel(group, torch.float32, args.sequence_parallel)
    layer = TransformerLayer(args, tp, RotaryTable(args.head_dim, args.rotary_emb_base, None, args.seq_length))
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.1)
    return layer, torch.randn(
        case.seq // (world_size if sequence_parallel else 1), 2, args.hidden_size, requires_grad=True
    )


def _events(rank: int, world_size: int, frozen: bool) -> tuple[list[str], list[str]]:
    """Events of a decoder layer with sequence parallelism: (forward, backward)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    layer, x = _layer(True)
    if frozen:
        layer.requires_grad_(False)
    events = _Events()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                events.names.append("product")
            return func(*args, **(kwargs or {}))

    with Products():
        y = layer(x)
        forward, events.names[:] = list(events.names), []
        y.sum().backward()
    return forward, events.names


def collectives(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(("all", "reduce"))]


def beside_products(names: list[str]) -> int:
    """Collectives that overlap with a product."""
    spans = [
        (start, names.index(f"end of {kind}", start)) for start, kind in enumerate(names) if kind in collectives(names)
    ]
    return sum("product" in names[start:stop] for start, stop in spans)


def test_a_layer_has_the_collectives_that_the_planner_counts() -> None:
    from megatron.planner.cost.parallel_layout import ParallelLayout
    from megatron.planner.cost.traffic import layer_collectives

    counted = layer_collectives(ParallelLayout(2, 1, 1, 1, 1, sequence_parallel=True))
    for forward, backward in run_ranks(_events, 2, False):
        assert collectives(forward) == ["all_gather_into_tensor", "reduce_scatter_tensor"] * 2
        assert len(collectives(forward)) == counted.forward
        assert collectives(backward).count("all_gather_into_tensor") == 4
        assert collectives(backward).count("reduce_scatter_tensor") == 2
        assert len(collectives(backward)) == counted.backward
        assert beside_products(forward) == 0
        assert beside_products(backward) == counted.beside


def test_frozen_weights_need_no_second_gather() -> None:
    for _, backward in run_ranks(_events, 2, True):
        assert collectives(backward).count("all_gather_into_tensor") == 2


def _plain_collectives(rank: int, world_size: int) -> tuple[int, int]:
    layer, x = _layer(False)
    events = _Events()
    y = layer(x)
    forward = len(collectives(events.names))
    y.sum().backward()
    return forward, len(collectives(events.names)) - forward


def test_plain_tensor_parallelism_has_four_all_reduces() -> None:
    from megatron.planner.cost.parallel_layout import ParallelLayout
    from megatron.planner.cost.traffic import layer_collectives

    counted = layer_collectives(ParallelLayout(2, 1, 1, 1, 1))
    for forward, backward in run_ranks(_plain_collectives, 2):
        assert (2 * forward, 2 * backward) == (counted.forward, counted.backward)


def _refused(rank: int, world_size: int) -> str:
    from megatron.model.sequence_parallel import ScatterLinear

    try:
        ScatterLinear(4, 4, dist.group.WORLD, torch.float32)(torch.zeros(7, 1, 2))
    except ValueError as error:
        return str(error)
    return ""


def _summed(rank: int, world_size: int) -> list[Tensor]:
    from megatron.model.sequence_parallel import sum_over_slices

    flat = torch.arange(10.0) + rank
    parts = [flat[:3], flat[3:4], flat[4:]]  # views, as an optimizer holds them
    sum_over_slices(parts, dist.group.WORLD)
    sum_over_slices([], dist.group.WORLD)
    return [flat]


def test_gradients_are_summed_in_place() -> None:
    for (flat,) in run_ranks(_summed, 2):
        assert torch.equal(flat, 2 * torch.arange(10.0) + 1)


def test_a_sequence_that_cannot_be_cut_is_refused() -> None:
    assert run_ranks(_refused, 2)[0] == "a sequence of 7 tokens cannot be cut into 2 equal slices"
