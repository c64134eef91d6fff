"""Pooled vectors at any TP x PP x DP, independent of the other texts in a batch.

Every input is padded on the right to a length that depends only on its own, and every micro-batch has
`train_micro_batch_size_per_gpu` rows. No token attends to the padding, and it is not pooled. Micro-batches are divided
among data-parallel replicas; a pipeline stage starts the next micro-batch as soon as it has sent the previous one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.common.errors import UserError
from megatron.engine.protocol import Engine
from megatron.generation.stages import HiddenLinks
from megatron.model.features import PooledTokens, Pooling, entering_shape, last_file
from megatron.model.pipeline import PARAMETER_DTYPES
from megatron.neox_arguments import NeoXArgs

LENGTH_STEP = 64  # inputs are padded to multiples of it
_IN_FLIGHT = 4  # micro-batches whose hidden states a stage keeps until they are sent


@dataclass(frozen=True)
class WantedVectors:
    """Which vectors to compute: layers (numbered as in `megatron.model.features`), pooling, and first pooled token."""

    layers: tuple[int, ...]
    pooling: Pooling
    first: int


@dataclass(frozen=True)
class _Chunk:
    """A micro-batch: the indices of its texts, at most `rows` of them, and the length to which all are padded."""

    texts: tuple[int, ...]
    rows: int
    length: int


def pooled_vectors(engine: Engine, args: NeoXArgs, texts: Sequence[np.ndarray], wanted: WantedVectors) -> Tensor:
    """Vectors, fp32 [len(texts), len(wanted.layers), h] in the order of both, on every rank. Collective.

    Every rank passes the same `texts`, the inputs of the embedding: token ids [s], or patches [s, values] for a model
    of images, with s from 1 to `seq_length`. Raises UserError on all ranks for ids outside the vocabulary, and for
    vectors that are not finite.
    """
    highest = max(int(ids.max()) for ids in texts) if texts[0].ndim == 1 else 0
    if texts[0].ndim == 1 and highest >= args.vocab_size:
        raise UserError(
            f"the texts hold the token {highest}, the model's vocabulary ends at {args.vocab_size - 1}; is vocab_file "
            f"the tokenizer of this model?"
        )
    place = engine.place
    found = torch.zeros(len(texts), len(wanted.layers), args.hidden_size, device=place.device)
    links = HiddenLinks(engine, in_flight=_IN_FLIGHT)
    for chunk in _chunks(texts, args)[place.dp_rank :: place.dp]:
        vectors = _run(engine, args, links, texts, chunk, wanted)
        if place.tp_rank == 0:
            for layer, rows in vectors.items():
                found[list(chunk.texts), wanted.layers.index(layer)] = rows[: len(chunk.texts)]
    links.close()
    dist.all_reduce(found)  # each vector is on one rank, the other ranks have zeros
    wrong = int((~found.isfinite()).flatten(1).any(1).sum())
    if wrong:
        raise UserError(
            f"the vectors of {wrong} of {len(texts)} texts are not finite: the weights are damaged or overflow in this "
            f"precision; try precision: fp32"
        )
    return found


def _chunks(texts: Sequence[np.ndarray], args: NeoXArgs) -> list[_Chunk]:
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(texts):
        length = min(-(-len(ids) // LENGTH_STEP) * LENGTH_STEP, args.seq_length)
        by_length.setdefault(length, []).append(number)
    rows = args.train_micro_batch_size_per_gpu
    return [
        _Chunk(tuple(numbers[start : start + rows]), rows, length)
        for length, numbers in sorted(by_length.items())
        for start in range(0, len(numbers), rows)
    ]


def _run(
    engine: Engine,
    args: NeoXArgs,
    links: HiddenLinks,
    texts: Sequence[np.ndarray],
    chunk: _Chunk,
    wanted: WantedVectors,
) -> dict[int, Tensor]:
    """This stage's vectors [rows, h] of one micro-batch, by layer."""
    place = engine.place
    own, stop = engine.stage_layers(place.pp_rank), last_file(wanted.layers, args.num_layers)
    if own.start > stop:
        return {}
    # Rows without a text get one token, so that their mean is defined.
    lengths = torch.full((chunk.rows,), wanted.first + 1)
    lengths[: len(chunk.texts)] = torch.tensor([len(texts[number]) for number in chunk.texts])
    work = PooledTokens(frozenset(wanted.layers), wanted.pooling, wanted.first, lengths.to(place.device))
    if place.first_stage:
        first = torch.from_numpy(texts[0])
        inputs = torch.zeros(chunk.rows, chunk.length, *first.shape[1:], dtype=first.dtype)
        for row, number in enumerate(chunk.texts):
            inputs[row, : len(texts[number])] = torch.from_numpy(texts[number])
        inputs = inputs.to(place.device)
    else:
        shape = entering_shape(own.start, args.num_layers, args.hidden_size, chunk.rows, chunk.length)
        inputs = links.receive_hidden(shape, PARAMETER_DTYPES[args.precision])
    hidden, vectors = engine.forward_pooled(inputs, work)
    if own.stop <= stop and not place.last_stage:
        links.send_hidden(hidden)
    return vectors
