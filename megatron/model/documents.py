"""The documents of a micro-batch whose documents are isolated: where they begin, on the device and on the host.

Between stages and from the data come positions, int64 [b, s], which restart at 0 with each document. A stage reads them
once, before its first layer; its layers get what was read, also in recomputation, and ask the device nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Goes through the layers of a stage beside the hidden states.

    `edges` are of every sample the starts of its documents, and s at the end. `offsets` [number of documents + 1],
    int32 on the device, are the same over the tokens of all samples, one sample behind the other. `longest` is the
    largest number of tokens of a document.
    """

    positions: Tensor
    edges: tuple[tuple[int, ...], ...]
    offsets: Tensor
    longest: int

    @classmethod
    def at(cls, positions: Tensor, on_host: Tensor | None = None) -> Documents:
        """The documents that start where `positions` [b, s] are 0, and at the beginning of each sample.

        `on_host` is the same tensor there, if the caller has it. Without it this waits for the device.
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
    """What enters a stage, hidden states or (hidden states, positions), with the positions read."""
    return (message[0], Documents.at(message[1])) if isinstance(message, tuple) else message


def as_message(stream: Any) -> Any:
    """What leaves a stage, with positions again where there are documents."""
    return (stream[0], stream[1].positions) if isinstance(stream, tuple) else stream
