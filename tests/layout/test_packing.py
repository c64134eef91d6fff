"""Together, the ranks hold each source exactly once, or once per rank for replicated tensors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.layout import LlamaShape, Packing, file_rows, padded_vocab_size, rank_shape, rank_slices, source_shapes
from megatron.layout.row import LayerFile
from tests.support.invented_rows import AdaptedShape

pytestmark = pytest.mark.unit


@st.composite
def splits(draw: Any) -> tuple[LlamaShape, int]:
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    kv_heads = tp * draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    vocabulary = draw(st.integers(1, 200))
    shape = AdaptedShape(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=heads * 2 * draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=tp * draw(st.integers(1, 9)),
        vocab_size=vocabulary,
        padded_vocab_size=padded_vocab_size(vocabulary, draw(st.sampled_from([1, 3, 64])), tp),
        tied=False,
    )
    return shape, tp


@settings(max_examples=150, deadline=None, derandomize=True)
@given(splits())
def test_slices_of_all_ranks_cover_each_source_once(chosen: tuple[LlamaShape, int]) -> None:
    shape, tp = chosen
    shape.check_tensor_parallel(tp)
    for row in (row for file in LayerFile for row in file_rows(file, shape)):
        dim, sources = row.shard_dim or 0, source_shapes(row, shape)
        held: list[list[int]] = [[] for _ in sources]
        padding = 0
        for rank in range(tp):
            slices = rank_slices(row, shape, tp, rank)
            assert sum(map(len, slices)) == rank_shape(row, shape, tp)[dim], row.neox
            for piece in slices:
                if piece.source is None:
                    padding += len(piece)
                else:
                    held[piece.source] += range(piece.start, piece.stop)
        copies = tp if row.replicated else 1
        for indices, source in zip(held, sources, strict=True):
            assert sorted(indices) == sorted(list(range(source[dim])) * copies), row.neox
        assert padding == (shape.padded_vocab_size - shape.vocab_size) * (row.packing is Packing.VOCAB), row.neox


@settings(max_examples=50, deadline=None, derandomize=True)
@given(splits())
def test_ranks_hold_whole_heads(chosen: tuple[LlamaShape, int]) -> None:
    """A rank has the key and value heads that its query heads attend to."""
    shape, tp = chosen
    (row,) = (row for row in file_rows(LayerFile.DECODER, shape) if row.packing is Packing.QKV)
    d, queries_per_kv = shape.head_dim, shape.num_attention_heads // shape.num_kv_heads
    for rank in range(tp):
        heads: list[set[int]] = [set(), set(), set()]
        for piece in rank_slices(row, shape, tp, rank):
            assert piece.source is not None
            assert piece.start % d == piece.stop % d == 0
            heads[piece.source] |= set(range(piece.start // d, piece.stop // d))
        queries, keys, values = heads
        assert keys == values == {head // queries_per_kv for head in queries}
