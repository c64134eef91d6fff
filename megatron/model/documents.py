"""Isolated documents of a micro-batch: where each one begins, on the device and on the host.

The data and the previous stage provide positions, int64 [b, s], which restart at 0 with each document. A stage reads
them on the host once, before its first layer; its layers reuse the result, also in recomputation, without device syncs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Document boundaries of a micro-batch, passed through a stage's layers together with the hidden states.

    `edges` holds, for each sample, the starts of its documents followed by s. `offsets` [number of documents + 1],
    int32 on the device, are the boundaries in the concatenation of all samples. `longest` is the length of the longest
    document in tokens.
    """

    positions: Tensor
    edges: tuple[tuple[int, ...], ...]
    offsets: Tensor
    longest: int

    @classmethod
    def at(cls, positions: Tensor, on_host: Tensor | None = None) -> Documents:
        """Documents start at the beginning of each sample and wherever `positions` [b, s] is 0.

        `on_host` is a host copy of `positions`, if the caller has one; without it, this waits for the device.
        """
        length = positions.shape[1]
        edges = []
        for row in (positions if on_host is None else on_host).tolist():
            edges.append((0, *(place for place, position in enumerate(row) if position == 0 and place > 0), length))
        starts = [number * length + start for number, row in enumerate(edges) for start in row[:-1]]
        return cls(
            positions,
            tuple(edges),
            torch.tensor([*starts, len(edges) * length], dtype=torch.int32).to(positions.device, non_blocking=True),
            max(stop - start for row in edges for start, stop in itertools.pairwise(row)),
        )


def from_message(message: Any) -> Any:
    """Convert a stage's input for its layers: (hidden states, positions) -> (hidden states, `Documents`)."""
    return (message[0], Documents.at(message[1])) if isinstance(message, tuple) else message


def as_message(stream: Any) -> Any:
    """Convert the layers' output to a stage's: (hidden states, `Documents`) -> (hidden states, positions)."""
    return (stream[0], stream[1].positions) if isinstance(stream, tuple) else stream
