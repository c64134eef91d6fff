"""HF -> NeoX -> HF and NeoX -> HF -> NeoX keep every bit, for every legal split, and the layout is the published one.

A round trip alone would pass with any bijection, so the layer files are compared with a second implementation of the
layout (`neox_oracle.py`), and each layout mistake is shown to fail that comparison.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron import layout
from megatron.layout import LlamaShape, Packing, Slice, TensorRow
from tests.support.hf_folders import TEXT_FILES, Model, convert, read_hf, same, tag_files, write_hf
from tests.support.neox_oracle import LayerFiles, neox_files
from tools.convert_hf.commands import convert as convert_command
from tools.convert_hf.stream import targets, tensor_map

pytestmark = pytest.mark.unit

GRID = [
    pytest.param(
        Model(kv_heads=kv, tied=tied, dtype=dtype),
        tp,
        multiple,
        id=f"8-{kv}-tp{tp}-{'tied' if tied else 'untied'}-{str(dtype).removeprefix('torch.')}-vocab{multiple}",
    )
    for kv in (8, 2, 1)
    for tp in (1, 2, 4, 8)
    if kv % tp == 0
    for tied in (False, True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for multiple in (1, 16)
    if 50 % tp == 0 or multiple > 1
]


def load_layers(folder: Path) -> LayerFiles:
    return {p.name: torch.load(p, weights_only=True) for p in sorted(folder.glob("layer_*.pt"))}


def assert_same_files(found: LayerFiles, expected: LayerFiles) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert same(found[name], expected[name]), name


@pytest.mark.parametrize(("model", "tp", "multiple"), GRID)
def test_round_trip(model: Model, tp: int, multiple: int, tmp_path: Path) -> None:
    hf, neox, back, again = (tmp_path / n for n in ("hf", "neox", "back", "again"))
    state = write_hf(hf, model, shards=2)
    convert("to-neox", "--input", hf, "--output", neox, "--tp", tp, "--vocab-divisible-by", multiple)
    tag = neox / (neox / "latest").read_text().strip()
    assert_same_files(load_layers(tag), neox_files(state, model.heads, model.kv_heads, tp, multiple))
    convert("to-hf", "--input", neox, "--output", back)
    assert same(read_hf(back), state)
    assert json.loads((back / "config.json").read_text()) == model.config()
    for name in ("config.json", *TEXT_FILES):
        assert (back / name).read_bytes() == (hf / name).read_bytes(), name
    convert("to-neox", "--input", back, "--output", again, "--tp", tp, "--vocab-divisible-by", multiple)
    assert_same_files(load_layers(again / tag.name), load_layers(tag))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_reshard_equals_a_direct_conversion(before: int, after: int, tmp_path: Path) -> None:
    model = Model(kv_heads=4)
    write_hf(tmp_path / "hf", model)
    for tp in (before, after):
        out = tmp_path / f"tp{tp}"
        convert("to-neox", "--input", tmp_path / "hf", "--output", out, "--tp", tp, "--vocab-divisible-by", 3)
    convert("reshard", "--input", tmp_path / f"tp{before}", "--output", tmp_path / "resharded", "--tp", after)
    assert_same_files(
        load_layers(tmp_path / "resharded" / "global_step0"), load_layers(tmp_path / f"tp{after}" / "global_step0")
    )


@st.composite
def random_models(draw: Any) -> tuple[Model, int, int]:
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    kv = tp * draw(st.integers(1, 3))
    model = Model(
        layers=draw(st.integers(1, 3)),
        heads=kv * draw(st.integers(1, 4)),
        kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 4)),
        intermediate=tp * draw(st.integers(1, 9)),
        vocab=draw(st.integers(1, 70)),
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
    )
    return model, tp, draw(st.sampled_from([1, 3, 128]))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chosen=random_models(), shards=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_round_trip_of_random_shapes(tmp_path: Path, chosen: tuple[Model, int, int], shards: int, seed: int) -> None:
    model, tp, multiple = chosen
    with tempfile.TemporaryDirectory(dir=tmp_path) as name, pytest.MonkeyPatch.context() as patch:
        # Bands of a few rows, so that one tensor is many jobs and job boundaries fall inside heads and ranks.
        patch.setattr(convert_command, "memory_plan", lambda *_: (200, 2))
        root = Path(name)
        state = write_hf(root / "hf", model, model.state(seed), shards=shards)
        convert(
            "to-neox", "--input", root / "hf", "--output", root / "neox", "--tp", tp, "--vocab-divisible-by", multiple
        )
        found = load_layers(root / "neox" / "global_step0")
        assert_same_files(found, neox_files(state, model.heads, model.kv_heads, tp, multiple))
        convert("to-hf", "--input", root / "neox", "--output", root / "back", "--shard-size", "3KB")
        assert same(read_hf(root / "back"), state)


def test_small_bands_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Band limits fall inside heads, ranks and chunks; the files equal those of one band per tensor."""
    write_hf(tmp_path / "hf", Model(kv_heads=8))
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "whole", "--tp", 4, "--vocab-divisible-by", 7)
    monkeypatch.setattr(convert_command, "memory_plan", lambda *_: (3 * 64, 3))
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "bands", "--tp", 4, "--vocab-divisible-by", 7)
    whole, pieces = tag_files(tmp_path / "whole"), tag_files(tmp_path / "bands")
    model_yml = whole.pop("model.yml").replace(b"/whole/", b"/bands/")
    assert model_yml == pieces.pop("model.yml")
    assert whole == pieces


def _mutate_slices(change: Callable[[list[Slice], TensorRow, LlamaShape, int], list[Slice]]) -> Any:
    def mutated(row: TensorRow, shape: LlamaShape, tp: int, rank: int) -> list[Slice]:
        return change(layout.rank_slices(row, shape, tp, rank), row, shape, rank)

    return mutated


def _swap_sources(packing: Packing, a: int, b: int) -> Any:
    names = {a: b, b: a}

    def change(slices: list[Slice], row: TensorRow, shape: LlamaShape, rank: int) -> list[Slice]:
        if row.packing is not packing:
            return slices
        return [dataclasses.replace(s, source=names.get(s.source or 0, s.source)) for s in slices]

    return _mutate_slices(change)


def _reversed_groups(slices: list[Slice], row: TensorRow, shape: LlamaShape, rank: int) -> list[Slice]:
    return slices[::-1] if row.packing is Packing.QKV else slices


def _swapped_norms(shape: LlamaShape) -> Iterator[tuple[int, int | None, tuple[TensorRow, ...]]]:
    for index, layer, rows in layout.layer_files(shape):
        if layer is not None:
            rows = tuple(dataclasses.replace(r, hf=rows[3 - i].hf) if r.replicated else r for i, r in enumerate(rows))
        yield index, layer, rows


MUTATIONS = {
    "gate/up swapped": (tensor_map, "rank_slices", _swap_sources(Packing.UP_GATE, 0, 1)),
    "k/v swapped": (tensor_map, "rank_slices", _swap_sources(Packing.QKV, 1, 2)),
    "group order": (tensor_map, "rank_slices", _mutate_slices(_reversed_groups)),
    "norm swapped with its neighbor": (targets, "layer_files", _swapped_norms),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_oracle_sees_a_wrong_layout(
    mutation: str, kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(kv_heads=kv_heads)
    state = write_hf(tmp_path / "hf", model)
    monkeypatch.setattr(*MUTATIONS[mutation])
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2, "--vocab-divisible-by", 1)
    found = load_layers(tmp_path / "neox" / "global_step0")
    with pytest.raises(AssertionError):
        assert_same_files(found, neox_files(state, model.heads, kv_heads, 2, 1))


def test_casts_round_to_nearest_and_only_when_asked(tmp_path: Path) -> None:
    model = Model(dtype=torch.float32)
    state = write_hf(tmp_path / "hf", model)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2, "--dtype", "bf16")
    convert("to-hf", "--input", tmp_path / "neox", "--output", tmp_path / "back")
    assert same(read_hf(tmp_path / "back"), {n: t.bfloat16() for n, t in state.items()})
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == model.config() | {"torch_dtype": "bfloat16"}


def test_a_cast_that_overflows_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(dtype=torch.float32)
    state = model.state()
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    write_hf(tmp_path / "hf", model, state)
    convert(
        "to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 1, "--dtype", "fp16", expect=2
    )
    assert "model.layers.1.mlp.up_proj.weight has values that are too large" in capsys.readouterr().err
    assert not (tmp_path / "neox").exists()
