"""Host copies for background saves share no memory with the engine, and reuse the same memory every time."""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.checkpoint.rank_files import FileContent, HostCopies, tensor_bytes
from megatron.layout import layer_files, rank_shape
from megatron.neox_arguments import NeoXArgs

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


class Scale:
    """An object that holds values, like DeepSpeed's loss scaler."""

    def __init__(self) -> None:
        self.value = [1.0]


def state() -> dict[str, Any]:
    flat = torch.arange(100, dtype=torch.float32)
    return {
        "weight": nn.Parameter(torch.ones(3, 4)),
        "half": torch.full((7,), 2.0, dtype=torch.bfloat16),
        "part": flat[10:20],
        "columns": flat.view(10, 10)[:, :3],
        "nested": [{"step": torch.tensor(5)}, (torch.zeros(2), None, "text")],
        "shapes": OrderedDict(w=torch.Size([3, 4])),
        "scale": Scale(),
    }


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def test_a_snapshot_keeps_what_was_when_everything_changes() -> None:
    live, expected = state(), state()
    copied = HostCopies().snapshot({"a": FileContent(live)})["a"].content
    with torch.no_grad():
        for tensor in tensors(live):
            tensor.fill_(77)
    live["scale"].value[0] = 0.5
    live["shapes"]["more"] = torch.Size([1])
    live["nested"].append(1)
    for one, other in zip(tensors(copied), tensors(expected), strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)
        assert one.untyped_storage().nbytes() == one.nbytes, "a file would hold the whole buffer of a view"
    assert copied["scale"].value == [1.0]
    assert (type(copied["shapes"]), copied["shapes"]) == (OrderedDict, expected["shapes"])
    assert type(copied["shapes"]["w"]) is torch.Size
    assert len(copied["nested"]) == 2
    assert copied["nested"][1][1:] == (None, "text")


def test_the_next_snapshot_takes_the_same_memory() -> None:
    copies, contents = HostCopies(), {"a": FileContent(state()), "b": FileContent({"weight": torch.ones(5)})}
    first = copies.snapshot(contents)
    places = [tensor.data_ptr() for name in first for tensor in tensors(first[name].content)]
    assert tensor_bytes(first) == tensor_bytes(contents) == 12 * 4 + 7 * 2 + 10 * 4 + 30 * 4 + 8 + 2 * 4 + 5 * 4
    contents["b"].content["weight"].fill_(9)
    second = copies.snapshot(contents)
    assert [tensor.data_ptr() for name in second for tensor in tensors(second[name].content)] == places
    assert torch.equal(second["b"].content["weight"], torch.full((5,), 9.0))


def test_the_guides_figures_for_the_70b() -> None:
    """Bytes of a rank's copies at TP8 x PP8 x DP32: bf16 layer files, and twelve bytes per parameter, divided by DP."""
    names = ("model", "cpt", "frontier")
    args = NeoXArgs.from_ymls([ROOT / f"configs/llama31_70b/{name}.yml" for name in names])
    assert (args.async_save, args.model_parallel_size, args.pipe_parallel_size) == (True, 8, 8)
    assert args.data_parallel_size == 32
    sizes = {
        index: sum(prod(rank_shape(row, args.shape, 8)) for row in rows) for index, _, rows in layer_files(args.shape)
    }
    embedding, layer, head = sizes[0], sizes[2], sizes[84]
    guide = (ROOT / "docs/checkpoints.md").read_text()
    for parameters, file in ((10 * layer, layer), (10 * layer + embedding, embedding), (10 * layer + head, head)):
        optimizer, weights = 12 * parameters / 32 / 1e9, 2 * file / 1e9
        assert f"| {optimizer:.2f} GB | {weights:.2f} GB | {optimizer + weights:.2f} GB |" in guide
    total = 14 * 8 * (80 * layer + embedding + head + sizes[83]) / 1e9
    assert f"{total:.0f} GB in total" in guide
    largest = 8 * (12 * (10 * layer + embedding) / 32 + 2 * embedding) / 1e9
    assert f"This is at most {largest:.1f} of a Frontier" in guide
