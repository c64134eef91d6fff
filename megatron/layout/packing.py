"""What a tensor-parallel rank stores of each row of the table, and how the model reads its fused tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.layout.row import Packing, TensorRow

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.layout.shape import LlamaShape


@dataclass(frozen=True)
class Slice:
    """Rows `start:stop` (along `shard_dim`) of source number `source`; `source` None means zero padding rows."""

    source: int | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def source_shapes(row: TensorRow, shape: LlamaShape) -> tuple[tuple[int, ...], ...]:
    """Shape of each Hugging Face source of a row, unpadded, in packing order."""
    return tuple(
        tuple(size if isinstance(size, int) else getattr(shape, size) for size in sizes) for sizes in row.sizes
    )


def rank_shape(row: TensorRow, shape: LlamaShape, tp: int) -> tuple[int, ...]:
    """Shape of the tensor that one of `tp` ranks stores; ValueError if it cannot be cut into `tp` equal parts."""
    sources = source_shapes(row, shape)
    local = list(sources[0])
    if row.shard_dim is not None:
        stored = [source[row.shard_dim] for source in sources]
        if row.packing is Packing.VOCAB:
            stored = [shape.padded_vocab_size]
        for size in stored:
            if size % tp:
                raise ValueError(f"{row.neox}: {size} cannot be cut into {tp} equal parts")
        local[row.shard_dim] = sum(stored) // tp
    return tuple(local)


def rank_slices(row: TensorRow, shape: LlamaShape, tp: int, tp_rank: int) -> list[Slice]:
    """What rank `tp_rank` of `tp` stores, as source slices to be concatenated in order along `shard_dim`.

    A replicated tensor is one slice, all of its source (along dimension 0). The inverse is the same list read
    backwards; nothing else is needed to convert, export or reshard.
    """
    sources = source_shapes(row, shape)
    if row.shard_dim is None:
        return [Slice(0, 0, sources[0][0])]
    if row.packing is Packing.VOCAB:
        local = shape.padded_vocab_size // tp
        start, stop = tp_rank * local, (tp_rank + 1) * local
        real_start, real_stop = min(start, shape.vocab_size), min(stop, shape.vocab_size)
        real = [Slice(0, real_start, real_stop)] if real_stop > real_start else []
        pad = (stop - start) - (real_stop - real_start)
        return real + ([Slice(None, 0, pad)] if pad else [])
    if row.packing is Packing.QKV and shape.multi_head:
        d, heads = shape.head_dim, shape.num_attention_heads // tp
        return [
            Slice(source, head * d, (head + 1) * d)
            for head in range(tp_rank * heads, (tp_rank + 1) * heads)
            for source in range(3)
        ]
    slices = []
    for source, source_shape in enumerate(sources):
        local = source_shape[row.shard_dim] // tp
        slices.append(Slice(source, tp_rank * local, (tp_rank + 1) * local))
    return slices


def split_qkv(mixed: Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a rank's fused projection output into q, k, v without a copy.

    `mixed` is [..., (heads + 2 kv_heads) head_dim] with the rank's own head counts; returns q [..., heads, head_dim]
    and k, v [..., kv_heads, head_dim] as views.
    """
    if heads == kv_heads:
        q, k, v = mixed.unflatten(-1, (heads, 3, head_dim)).unbind(-2)
        return q, k, v
    q, k, v = mixed.unflatten(-1, (heads + 2 * kv_heads, head_dim)).split((heads, kv_heads, kv_heads), dim=-2)
    return q, k, v


def join_qkv(qkv: tuple[Tensor, Tensor, Tensor], heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """The inverse of `split_qkv` for the outputs of the three projections, [..., heads head_dim] and twice
    [..., kv_heads head_dim]: [..., (heads + 2 kv_heads) head_dim], a copy."""
    from torch import cat, stack

    if heads == kv_heads:
        return stack([part.unflatten(-1, (heads, head_dim)) for part in qkv], dim=-2).flatten(-3)
    return cat(qkv, dim=-1)


def split_up_gate(fused: Tensor) -> tuple[Tensor, Tensor]:
    """Split the output of `mlp.linear1`, [..., 2 F/tp], into up and gate, [..., F/tp] each, as views."""
    up, gate = fused.chunk(2, dim=-1)
    return up, gate


def join_up_gate(up: Tensor, gate: Tensor) -> Tensor:
    """The inverse of `split_up_gate`, a copy."""
    from torch import cat

    return cat((up, gate), dim=-1)
