"""The table of tensors: complete, consistent, and with the published numbers of parameters."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron import layout
from megatron.layout import DECODER_LAYER, TABLE, Initialization, LayerFile, LlamaShape, Packing
from tests.support.invented_rows import AdaptedShape, SpectraShape

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
QKV, DENSE = DECODER_LAYER[1], DECODER_LAYER[2]
SMALL = LlamaShape(
    num_layers=3,
    hidden_size=16,
    num_attention_heads=4,
    num_kv_heads=2,
    intermediate_size=24,
    vocab_size=30,
    padded_vocab_size=32,
    tied=False,
)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (LlamaShape(80, 8192, 64, 8, 28_672, 128_256, 128_256, tied=False), 70_553_706_496),
        (LlamaShape(32, 4096, 32, 8, 14_336, 128_256, 128_256, tied=False), 8_030_261_248),
        (LlamaShape(16, 2048, 32, 8, 8192, 128_256, 128_256, tied=True), 1_235_814_400),
    ],
)
def test_parameters_are_the_published_numbers(shape: LlamaShape, parameters: int) -> None:
    assert shape.num_parameters == parameters


def test_padding_counts_and_a_tied_head_does_not() -> None:
    assert replace(SMALL, padded_vocab_size=64).num_parameters - SMALL.num_parameters == 2 * 32 * 16
    assert SMALL.num_parameters - replace(SMALL, tied=True).num_parameters == 32 * 16


def test_names_are_unique_within_a_file_and_among_sources() -> None:
    assert max(Counter((row.file, row.neox) for row in TABLE).values()) == 1
    assert max(Counter(name for row in TABLE for name in row.hf).values()) == 1
    for row in TABLE:
        assert all(("{layer}" in name) == (row.file is LayerFile.DECODER) for name in row.hf)


def test_files_and_rows_agree_by_number_and_by_kind() -> None:
    found = {index: (layer, rows) for index, layer, rows in layout.layer_files(SMALL)}
    assert {index: layer for index, (layer, _) in found.items()} == {0: None, 2: 0, 3: 1, 4: 2, 6: None, 7: None}
    for index in range(-1, 9):
        assert layout.rows_of(index, SMALL) == (found[index][1] if index in found else ())
    assert 7 not in {index for index, _, _ in layout.layer_files(replace(SMALL, tied=True))}


def test_a_tensor_is_found_in_its_file_only() -> None:
    assert layout.row_of(4, "mlp.linear1.weight", SMALL).packing is Packing.UP_GATE
    for index in (0, 5, 6, 7):
        with pytest.raises(LookupError, match=f"no tensor mlp.linear1.weight in layer {index} of 3"):
            layout.row_of(index, "mlp.linear1.weight", SMALL)


def test_only_norms_are_replicated_start_at_one_and_do_not_decay() -> None:
    norms = {row.neox for row in TABLE if "norm" in row.neox}
    assert len(norms) == 3
    assert {row.neox for row in TABLE if row.replicated} == norms
    assert {row.neox for row in TABLE if row.initialization is Initialization.ONES} == norms
    assert {row.neox for row in TABLE if not row.decays} == norms
    outputs = {row.neox for row in TABLE if row.initialization is Initialization.RESIDUAL_OUTPUT}
    assert outputs == {"attention.dense.weight", "mlp.linear2.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": Packing.REPLICATED}, "a replicated tensor has one source, not 3"),
        ({"shard_dim": None}, "packing qkv, but shard_dim None"),
        ({"hf": ("one",)}, "1 sources, but 3 shapes"),
    ],
)
def test_a_contradiction_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(QKV, **change)


def test_a_factor_is_cut_where_its_source_is() -> None:
    """[out, rank] and [rank, in] of a matrix cut by rows, of one cut by columns, and of the padded vocabulary's."""

    def factor(row: layout.TensorRow, source: int, keeps: Any) -> tuple[Any, ...]:
        found = row.low_rank_factor(source, keeps, 5, "lora", Initialization.NORMAL)
        assert found.file is row.file
        assert found.modality == row.modality
        assert found.decays
        shapes = layout.source_shapes(found, SMALL)
        return found.neox, found.hf, shapes, found.packing, found.shard_dim, layout.rank_shape(found, SMALL, 2)

    key = ("attention.query_key_value.k_proj.lora.weight", ("model.layers.{layer}.self_attn.k_proj.lora.weight",))
    assert factor(QKV, 1, 0) == (*key, ((8, 5),), Packing.SPLIT, 0, (4, 5))
    assert factor(QKV, 1, 1) == (*key, ((5, 16),), Packing.REPLICATED, None, (5, 16))
    out = ("attention.dense.o_proj.lora.weight", ("model.layers.{layer}.self_attn.o_proj.lora.weight",))
    assert factor(DENSE, 0, 0) == (*out, ((16, 5),), Packing.REPLICATED, None, (16, 5))
    assert factor(DENSE, 0, 1) == (*out, ((5, 16),), Packing.SPLIT, 1, (5, 8))
    head = ("final_linear.lm_head.lora.weight", ("lm_head.lora.weight",))
    assert factor(layout.HEAD[0], 0, 0) == (*head, ((30, 5),), Packing.VOCAB, 0, (16, 5))
    with pytest.raises(ValueError, match="is not a matrix"):
        DECODER_LAYER[0].low_rank_factor(0, 0, 5, "lora", Initialization.NORMAL)


def test_unequal_splits_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"attention\.query_key_value\.weight: 8 cannot be cut into 16 equal parts"):
        layout.rank_shape(QKV, SMALL, 16)


def test_another_modality_has_its_own_first_and_last_layer() -> None:
    files = {index: [row.neox for row in rows] for index, _, rows in layout.layer_files(SpectraShape(**vars(SMALL)))}
    text = {index: [row.neox for row in rows] for index, _, rows in layout.layer_files(SMALL)}
    assert files.pop(0) == ["projection.weight"]
    assert files.pop(7) == ["output.bias"]
    assert files == {index: names for index, names in text.items() if index not in (0, 7)}


def test_a_shape_with_other_tensors_is_another_shape() -> None:
    """Caches are keyed by shape."""
    adapted = AdaptedShape(**vars(SMALL))
    assert adapted != SMALL
    assert replace(adapted, tied=True).table == AdaptedShape.table
    assert vars(adapted) == vars(SMALL)  # what a manifest records


def test_standard_library_only() -> None:
    """A login node can convert without importing torch for the table."""
    code = (
        "import sys; before = set(sys.modules); import megatron.layout; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)), "
        "sorted(n for n in sys.modules if n.startswith('megatron.') and not n.startswith('megatron.layout')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == "['megatron'] []\n"
