"""Locating ranges of a rank's tensors at another tensor-parallel size, compared with tensors cut by plain slicing."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from megatron.layout import LlamaShape, Packing, TensorRow, TensorSplit, layer_files, padded_vocab_size, transfers

pytestmark = pytest.mark.unit

GROUPED = LlamaShape(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=8,
    num_kv_heads=4,
    intermediate_size=12,
    vocab_size=27,
    padded_vocab_size=28,
    tied=False,
)
MULTI_HEAD = replace(GROUPED, num_kv_heads=8)


def split(shape: LlamaShape, tp: int) -> TensorSplit:
    return TensorSplit(replace(shape, padded_vocab_size=padded_vocab_size(shape.vocab_size, 1, tp)), tp)


def cut(row: TensorRow, split: TensorSplit) -> list[np.ndarray]:
    """Every rank's flat tensor, cut from whole ones according to the packing's name; elements are numbered from 1."""
    shape, tp = split.shape, split.tp
    sizes = [tuple(getattr(shape, name) for name in names) for names in row.sizes]
    wholes, first = [], 1
    for size in sizes:
        wholes.append(np.arange(first, first + np.prod(size), dtype=np.float32).reshape(size))
        first += wholes[-1].size
    ranks = []
    for rank in range(tp):
        if row.packing is Packing.REPLICATED:
            ranks.append(wholes[0])
        elif row.packing is Packing.VOCAB:
            padded = np.zeros((shape.padded_vocab_size, sizes[0][1]), dtype=np.float32)
            padded[: shape.vocab_size] = wholes[0]
            ranks.append(np.split(padded, tp)[rank])
        elif row.packing is Packing.QKV and shape.multi_head:
            heads = [np.split(whole, shape.num_attention_heads) for whole in wholes]
            each = shape.num_attention_heads // tp
            mine = range(rank * each, (rank + 1) * each)
            ranks.append(np.concatenate([heads[source][head] for head in mine for source in range(3)]))
        else:
            ranks.append(np.concatenate([np.split(whole, tp, axis=row.shard_dim)[rank] for whole in wholes]))
    return [part.reshape(-1) for part in ranks]


def moved(
    row: TensorRow,
    here: TensorSplit,
    rank: int,
    start: int,
    stop: int,
    there: TensorSplit,
    stored: TensorRow | None = None,
) -> np.ndarray:
    """The range, assembled from the other split's tensors, which are cut according to `stored` (default: `row`)."""
    sources, out = cut(stored or row, there), np.zeros(stop - start, dtype=np.float32)
    for part in transfers(row, here, rank, start, stop, there):
        for run in range(part.count):
            source, target = part.source + run * part.source_pitch, part.target + run * part.target_pitch
            assert not out[target : target + part.length].any(), "written twice"
            out[target : target + part.length] = sources[part.tp_rank][source : source + part.length]
    return out


@pytest.mark.parametrize("shape", [GROUPED, MULTI_HEAD], ids=["grouped", "multi-head"])
def test_every_range_is_found_at_every_other_size(shape: LlamaShape) -> None:
    draw = random.Random(3)
    for here, there in product([split(shape, tp) for tp in (1, 2, 4)], repeat=2):
        for _, _, rows in layer_files(shape):
            for row in rows:
                for rank, whole in enumerate(cut(row, here)):
                    bounds = [(0, len(whole))] + [sorted(draw.sample(range(len(whole) + 1), 2)) for _ in range(8)]
                    for start, stop in bounds:
                        found = moved(row, here, rank, start, stop, there)
                        assert np.array_equal(found, whole[start:stop]), (
                            row.neox,
                            here.tp,
                            there.tp,
                            rank,
                            start,
                            stop,
                        )


def test_a_range_at_its_own_size_is_one_run_with_its_padding() -> None:
    """Data are not interpreted, so that saved state comes back bit for bit."""
    here = split(GROUPED, 4)
    for _, _, rows in layer_files(GROUPED):
        for row in rows:
            (only,) = transfers(row, here, 3, 2, 5, here)
            assert (only.tp_rank, only.source, only.target, only.length, only.count) == (3, 2, 0, 3, 1)


def test_a_wrong_packing_is_seen() -> None:
    """Mutation: interleaved heads are read as three blocks."""
    (qkv,) = [row for _, _, rows in layer_files(MULTI_HEAD) for row in rows if row.packing is Packing.QKV]
    here, there = split(MULTI_HEAD, 1), split(MULTI_HEAD, 2)
    whole = cut(qkv, here)[0]
    assert np.array_equal(moved(qkv, here, 0, 0, len(whole), there), whole)
    wrong = replace(qkv, packing=Packing.UP_GATE)
    assert not np.array_equal(moved(wrong, here, 0, 0, len(whole), there, stored=qkv), whole)
