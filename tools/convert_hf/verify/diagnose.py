"""Explain why two checkpoints differ, if the pattern matches a known converter bug.

Each known bug is a rearrangement: reading the stored tensors of one checkpoint by the wrong rule yields the values of
the other. A few rows of each tensor of a layer are enough to test it, so the test costs next to nothing, and a match
cannot be chance.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron.layout import LlamaShape, Slice

from ..formats.stored import Stored
from ..sources.checkpoint import Checkpoint
from ..stream.band_io import FilePool, read_band
from ..stream.tensor_map import Logical, Region, rows_and_columns

_Q, _K, _V = (f"self_attn.{p}_proj.weight" for p in "qkv")
_UP, _GATE = "mlp.up_proj.weight", "mlp.gate_proj.weight"
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_UNLIKE = 0.3  # relative distance above which a tensor is considered rearranged rather than trained or rounded
_ALIKE = 0.02

Order = Callable[[LlamaShape, int], list[Slice]]


@dataclass(frozen=True)
class Hypothesis:
    """A known bug. `order` lists the rows that the bug puts into the ranks' tensors, rank after rank."""

    text: str
    sources: tuple[str, ...]
    order: Order
    over_ranks: bool = False  # applies only to several ranks


def _naive(*sources: int, sizes: Callable[[LlamaShape], list[int]]) -> Order:
    return lambda shape, tp: [Slice(s, 0, sizes(shape)[s]) for s in sources]


def _qkv_sizes(shape: LlamaShape) -> list[int]:
    kv = shape.num_kv_heads * shape.head_dim
    return [shape.hidden_size, kv, kv]


def _mlp_sizes(shape: LlamaShape) -> list[int]:
    return [shape.intermediate_size] * 2


def _per_rank(*sources: int, sizes: Callable[[LlamaShape], list[int]]) -> Order:
    def order(shape: LlamaShape, tp: int) -> list[Slice]:
        local = [n // tp for n in sizes(shape)]
        return [Slice(s, r * local[s], (r + 1) * local[s]) for r in range(tp) for s in sources]

    return order


def _grouped(shape: LlamaShape, tp: int) -> list[Slice]:
    """For each key/value head: its query heads, its key, its value (Megatron; for MHA also GPT-NeoX)."""
    d, group = shape.head_dim, shape.num_attention_heads // shape.num_kv_heads
    result = []
    for head in range(shape.num_kv_heads):
        result.append(Slice(0, head * group * d, (head + 1) * group * d))
        result += [Slice(source, head * d, (head + 1) * d) for source in (1, 2)]
    return result


_QKV, _MLP = (_Q, _K, _V), (_UP, _GATE)
_NAIVE = "cut naively into ranks instead of packed rank by rank"
HYPOTHESES = (
    Hypothesis(f"[q; k; v] is {_NAIVE}", _QKV, _naive(0, 1, 2, sizes=_qkv_sizes), over_ranks=True),
    Hypothesis(
        "q, k, v are interleaved head by head (MHA packing) instead of [q | k | v] in each rank", _QKV, _grouped
    ),
    Hypothesis(
        "q, k, v are [q | k | v] in each rank (GQA packing) instead of interleaved head by head",
        _QKV,
        _per_rank(0, 1, 2, sizes=_qkv_sizes),
    ),
    Hypothesis("k and v are swapped", _QKV, _per_rank(0, 2, 1, sizes=_qkv_sizes)),
    Hypothesis(f"[gate; up] is {_NAIVE}", _MLP, _naive(1, 0, sizes=_mlp_sizes), over_ranks=True),
    Hypothesis(f"[up; gate] is {_NAIVE}", _MLP, _naive(0, 1, sizes=_mlp_sizes), over_ranks=True),
    Hypothesis("gate and up are swapped", _MLP, _per_rank(1, 0, sizes=_mlp_sizes)),
)


def weight_causes(one: Checkpoint, two: Checkpoint, names: list[str]) -> list[str]:
    """Known bugs that explain the differing tensors `names`, one sentence each."""
    layers = sorted({int(n.split(".")[2]) for n in names if n.startswith("model.layers.")})
    pool = FilePool(os.O_RDONLY)
    try:
        for layer in layers:
            found = list(_layer_causes(pool, one, two, layer, set(names)))
            if found:
                return [f"layer {layer}: {text}" for text in found]
    finally:
        pool.close()
    return []


def _layer_causes(pool: FilePool, one: Checkpoint, two: Checkpoint, layer: int, names: set[str]) -> Iterator[str]:
    prefix = f"model.layers.{layer}."
    differing = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    for suspect, other in ((two, one), (one, two)):
        if not suspect.packed_by_rank:
            continue
        for hypothesis in HYPOTHESES:
            if hypothesis.over_ranks and suspect.tp == 1:
                continue
            if differing & set(hypothesis.sources) and _explains(pool, suspect, other, prefix, hypothesis):
                yield f"in {suspect.root}, {hypothesis.text}"
                differing -= set(hypothesis.sources)
    if {_UP, _GATE} <= differing and _swapped(pool, one, two, prefix, _UP, _GATE):
        yield "gate and up are swapped"
    if {_K, _V} <= differing and _swapped(pool, one, two, prefix, _K, _V):
        yield "k and v are swapped"
    if set(_NORMS) <= differing and _swapped(pool, one, two, prefix, *_NORMS):
        yield "input_layernorm and post_attention_layernorm are swapped"
    if differing & {_Q, _K}:
        yield from _permuted(pool, one, two, prefix, differing)


def _read(pool: FilePool, tensor: Logical, start: int, stop: int):  # type: ignore[no-untyped-def]
    import torch

    cols = rows_and_columns(tensor.shape)[1]
    data = bytearray((stop - start) * cols * tensor.dtype.itemsize)
    read_band(pool, tensor, start, stop, memoryview(data))
    return torch.frombuffer(data, dtype=getattr(torch, tensor.dtype.name)).double().view(stop - start, cols)


def _distance(a, b) -> float:  # type: ignore[no-untyped-def]
    return float((a - b).norm() / max(float(b.norm()), 1e-30))


def _probes(rows: int, count: int = 8) -> list[tuple[int, int]]:
    """A few short row ranges spread over a tensor, both ends included."""
    width = min(2, rows)
    starts = {round(i * (rows - width) / max(count - 1, 1)) for i in range(count)}
    return [(start, start + width) for start in sorted(starts)]


def _like(pool: FilePool, tensor: Logical, reference: Logical, limit: float, beyond: bool = False) -> bool:
    """Whether the probed rows of two tensors are within `limit` of each other (or, with `beyond`, some are not)."""
    if tensor.shape != reference.shape:
        return False
    distances = [
        _distance(_read(pool, tensor, *rows), _read(pool, reference, *rows))
        for rows in _probes(rows_and_columns(tensor.shape)[0])
    ]
    return max(distances) > limit if beyond else max(distances) <= limit


def _explains(pool: FilePool, suspect: Checkpoint, other: Checkpoint, prefix: str, hypothesis: Hypothesis) -> bool:
    names = [prefix + n for n in hypothesis.sources]
    if any(n not in suspect.tensors or n not in other.tensors for n in names):
        return False
    if not any(_like(pool, suspect.tensors[n], other.tensors[n], _UNLIKE, beyond=True) for n in names):
        return False
    reread = _reread(suspect, names, hypothesis.order(suspect.shape, suspect.tp))
    return reread is not None and all(_like(pool, t, other.tensors[n], _ALIKE) for n, t in reread.items())


def _reread(checkpoint: Checkpoint, names: list[str], order: list[Slice]) -> dict[str, Logical] | None:
    """The logical tensors read from the same files if rows follow `order` across all ranks; None if not fused."""
    files: dict[tuple[str, int], Stored] = {}
    for name in names:
        for region in checkpoint.tensors[name].regions:
            files[str(region.stored.path), region.stored.offset] = region.stored
    ranks = [files[key] for key in sorted(files)]
    if len(ranks) != checkpoint.tp:
        return None
    local = ranks[0].shape[0]
    result = {n: Logical(n, checkpoint.tensors[n].shape, checkpoint.tensors[n].dtype) for n in names}
    position = 0
    for piece in order:
        assert piece.source is not None
        done = 0
        while done < len(piece):
            rank, row = divmod(position + done, local)
            rows = min(local - row, len(piece) - done)
            name = names[piece.source]
            cols = ranks[rank].shape[1]
            result[name].regions.append(Region(ranks[rank], name, row, 0, rows, cols, to_row=piece.start + done))
            done += rows
        position += done
    return result


def _swapped(pool: FilePool, one: Checkpoint, two: Checkpoint, prefix: str, a: str, b: str) -> bool:
    pairs = ((one.tensors[prefix + a], two.tensors[prefix + b]), (one.tensors[prefix + b], two.tensors[prefix + a]))
    if not any(
        _like(pool, one.tensors[prefix + n], two.tensors[prefix + n], _UNLIKE / 10, beyond=True) for n in (a, b)
    ):
        return False
    return all(_like(pool, x, y, _ALIKE / 10) for x, y in pairs)


def _permuted(pool: FilePool, one: Checkpoint, two: Checkpoint, prefix: str, differing: set[str]) -> Iterator[str]:
    """Whether q or k follows Meta's order of rotary pairs in one checkpoint and is split in halves in the other."""
    half = one.shape.head_dim // 2
    for meta, halves in ((two, one), (one, two)):
        names = [n for n in (_Q, _K) if n in differing]
        if all(_is_permuted(pool, meta.tensors[prefix + n], halves.tensors[prefix + n], half) for n in names):
            which = " and ".join(n.split(".")[1].removesuffix("_proj") for n in names)
            yield f"in {meta.root}, rows of {which} are in Meta's order (adjacent rotary pairs) instead of halves"
            return


def _is_permuted(pool: FilePool, meta: Logical, halves: Logical, half: int) -> bool:
    if meta.shape != halves.shape or half < 2:
        return False
    heads = meta.shape[0] // (2 * half)
    moved = False
    for head in {0, heads // 2, heads - 1}:
        start = head * 2 * half
        a, b = _read(pool, meta, start, start + 2 * half), _read(pool, halves, start, start + 2 * half)
        moved = moved or _distance(a, b) > _UNLIKE
        if _distance(a.view(half, 2, -1).transpose(0, 1).reshape_as(b), b) > _ALIKE:
            return False
    return moved
