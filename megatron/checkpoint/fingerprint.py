"""The fingerprint of a base: a hash of its weights in memory, the same at every layout and in every file format.

The elements of each Hugging Face tensor, as fp32 bit patterns, are summed modulo 2^64 with one pseudorandom factor for
the row and one for the column; a tensor's sum gets a factor from its name. Every rank sums what it holds, and an
all-reduce adds the ranks' sums.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron import layout

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine
    from megatron.neox_arguments import NeoXArgs

_ELEMENTS = 1 << 22  # at a time; their products take eight bytes each
_MODULUS = 1 << 64


@torch.no_grad()
def base_fingerprint(engine: Engine, args: NeoXArgs) -> str:
    """Fingerprint of the engine's weights, 16 hexadecimal digits. Collective over all ranks."""
    place, total = engine.place, 0
    if place.dp_rank == 0:
        for index, module in engine.numbered_layers():
            parameters = dict(module.named_parameters())
            for row in layout.rows_of(index, args.shape):
                if row.replicated and place.tp_rank:
                    continue
                position, dim = 0, row.shard_dim or 0
                for piece in layout.rank_slices(row, args.shape, place.tp, place.tp_rank):
                    if piece.source is not None:
                        part = parameters[row.neox].detach().narrow(dim, position, len(piece))
                        name = row.hf[piece.source].format(layer=index - layout.decoder_index(0))
                        total += _weight(name) * _sum(part, piece.start, dim)
                    position += len(piece)
    # Reduced in two halves, whose sums over all ranks stay far below 2^63.
    halves = torch.tensor([total % _MODULUS >> 32, total % (1 << 32)], dtype=torch.int64, device=place.device)
    dist.all_reduce(halves)
    high, low = halves.tolist()
    return f"{((high << 32) + low) % _MODULUS:016x}"


def _weight(name: str) -> int:
    return (zlib.crc32(name.encode()) << 1) | 1


def _sum(part: Tensor, start: int, dim: int) -> int:
    """The weighted sum over a part of a tensor that begins at `start` along `dim`."""
    matrix = part.reshape(part.shape[0], -1)
    rows = _factors(start if dim == 0 else 0, matrix.shape[0], part.device)
    columns = _factors(start if dim == 1 else 0, matrix.shape[1], part.device) * 2 + 1
    total = 0
    step = max(1, _ELEMENTS // matrix.shape[1])
    for first in range(0, matrix.shape[0], step):
        bits = matrix[first : first + step].float().contiguous().view(torch.int32).to(torch.int64)
        total += int(((bits * columns).sum(dim=1) * (rows[first : first + step] * 2 + 1)).sum())
    return total


def _factors(start: int, count: int, device: torch.device) -> Tensor:
    """A pseudorandom number for each of `count` positions from `start` (splitmix64's steps, Steele et al. 2014)."""
    x = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
