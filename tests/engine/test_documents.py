"""With isolated documents, no layer waits for the device, and a stage does so at most once per micro-batch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.engine.operations import choose_operations
from megatron.model.documents import Documents
from megatron.parallel.place import Place
from tests.support.engine_runs import Samples, build, make_samples, step
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=16, layers=3, rope=LLAMA3_ROPE, seq=24)
TO_HOST = {"tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__index__"}


def samples(count: int) -> list[dict[str, Tensor]]:
    """Samples of documents of several lengths, different in each sample."""
    made = make_samples(CASE, count)
    for number, sample in enumerate(made):
        lengths = (1 + number, 9 - number, CASE.seq - 10)
        sample["positions"] = torch.cat([torch.arange(length) for length in lengths])
    return made


def reads_of_positions() -> list[str]:
    """A list to which every method that copies positions ([b, s] or of all micro-batches) to the host adds its name.

    The methods are replaced for the rest of the process: a torch mode would miss recomputation in `backward`.
    """
    names: list[str] = []

    def watched(name: str, method: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.dtype == torch.int64 and tensor.dim() > 1 and tensor.shape[-1] == CASE.seq:
                names.append(name)
            return method(tensor, *args, **kwargs)

        return call

    for name in TO_HOST:
        setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    return names


def _reads(rank: int, world_size: int, engine: str, recompute: str) -> list[str]:
    keys = {"isolate_documents": True, "engine": engine, "recompute": recompute, "gradient_accumulation_steps": 2}
    args = CASE.neox(world_size=world_size, pipe_parallel_size=world_size, **keys)
    built = build(args, CASE)
    names = reads_of_positions()
    step(built, args, Samples(samples(4)))
    return names


@pytest.mark.parametrize(
    ("engine", "recompute"),
    [("deepspeed", "none"), ("deepspeed", "full"), ("megatron", "full"), ("megatron", "selective")],
)
def test_positions_are_read_once_a_micro_batch(engine: str, recompute: str) -> None:
    """Two micro-batches, three layers. Mutation: pass positions from layer to layer, as tensors."""
    assert run_ranks(_reads, 1, engine, recompute) == [["tolist"] * 2]


def test_a_stage_of_deepspeed_reads_what_it_receives() -> None:
    assert run_ranks(_reads, 2, "deepspeed", "full") == [["tolist"] * 2] * 2


def test_a_middle_stage_of_megatron_core_copies_all_at_once() -> None:
    """The other stages have the data on the host."""
    assert run_ranks(_reads, 3, "megatron", "none") == [["tolist"] * 2, ["cpu", "tolist", "tolist"], ["tolist"] * 2]


def _layers(rank: int, world_size: int) -> dict[str, list[bool]]:
    """Run a layer forward and backward on tensors without values; returns whether its parameters have gradients."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.checkpoint import checkpoint

    from megatron.model.llama import TransformerLayer
    from megatron.model.parallel import TensorParallel
    from megatron.model.rotary import RotaryTable
    from megatron.parallel.process_groups import form_groups

    form_groups(CASE.neox(world_size=1))
    on_host = torch.stack([sample["positions"] for sample in samples(2)])
    found = {}
    for recompute in ("none", "full", "selective"):
        args = CASE.neox(world_size=1, isolate_documents=True, engine="megatron", recompute=recompute)
        with FakeTensorMode() as fake:
            rotary = RotaryTable(CASE.head_dim, CASE.theta, args.rope_scaling, CASE.seq)
            layer = TransformerLayer(args, TensorParallel(torch.distributed.group.WORLD, torch.float32), rotary)
            hidden = torch.randn(CASE.seq, 2, CASE.hidden, requires_grad=True)
            stream = (hidden, Documents.at(fake.from_tensor(on_host), on_host))
            if recompute == "full":
                y, _ = checkpoint(layer, stream, use_reentrant=False, preserve_rng_state=False)
            else:
                y, _ = layer(stream)
            y.sum().backward()
        found[recompute] = [parameter.grad is not None for parameter in layer.parameters()]
    return found


def test_a_layer_reads_no_value_of_a_tensor() -> None:
    """Anything that would wait for a device raises. Mutation: `one_by_one` over `Documents.at(documents.positions)`."""
    assert run_ranks(_layers, 1) == [{recompute: [True] * 6 for recompute in ("none", "full", "selective")}]


@pytest.mark.unit
@pytest.mark.parametrize("isolated", [True, False])
def test_a_run_says_once_how_documents_are_attended_to(caplog: pytest.LogCaptureFixture, isolated: bool) -> None:
    args = CASE.neox(world_size=1, isolate_documents=isolated)
    with caplog.at_level(logging.INFO):
        choose_operations(args, Place.of(args, 0, 0, torch.device("cpu")))
    lines = [line for line in caplog.messages if "isolated documents" in line]
    why = "a call of attention for each (varlen attention needs a GPU)"
    assert lines == ([f"isolated documents on cpu: {why}"] if isolated else [])
