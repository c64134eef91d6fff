"""Hidden states of chosen layers, pooled to one vector per row during the forward pass.

Layers are numbered as in `hidden_states` of `transformers`: 0 is the embedding, i the output of decoder layer i, and
the last, L, the output of the final norm. A stage returns only the vectors, [b, h] per layer, never [b, s, h].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class PooledTokens:
    """What to pool in one forward pass: tokens `first` to `lengths`, exclusive, of each row, in each of `layers`.

    `pooling` takes the mean of these tokens or the last of them. Tokens past a row's length are padding.
    """

    layers: frozenset[int]
    pooling: Pooling
    first: int
    lengths: Tensor  # int64 [b]

    def pooled(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, h] in fp32."""
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), self.lengths - 1].float()
        places = torch.arange(hidden.shape[1], device=hidden.device)
        outside = (places < self.first) | (places >= self.lengths[:, None])
        total = hidden.float().masked_fill(outside[..., None], 0).sum(1)
        return total / (self.lengths - self.first)[:, None]


def layer_of_file(number: int, num_layers: int) -> int | None:
    """Index in `hidden_states` of the output of checkpoint layer `number`; None if it has none."""
    if number == 0:
        return 0
    if 2 <= number <= num_layers:
        return number - 1
    return num_layers if number == num_layers + 3 else None


def last_file(layers: Iterable[int], num_layers: int) -> int:
    """The checkpoint layer after which the outputs of all `layers` have been computed."""
    highest = max(layers)
    return num_layers + 3 if highest == num_layers else highest + (highest > 0)


def run_pooled(
    layers: Iterable[Callable[[Any], Any]], first_layer: int, num_layers: int, inputs: Tensor, work: PooledTokens
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run a stage's layers, as far as `work` needs them, on the model's input or on hidden states.

    Returns the next stage's input, and the pooled vectors [b, h] of the requested layers in this stage.
    """
    stop = last_file(work.layers, num_layers)
    stream, vectors = inputs, dict[int, Tensor]()
    for number, layer in enumerate(layers, start=first_layer):
        if number > stop:
            break
        stream = layer(stream)
        index = layer_of_file(number, num_layers)
        if index is not None and index in work.layers:
            sequence_first = 0 < index < num_layers
            vectors[index] = work.pooled(stream.transpose(0, 1) if sequence_first else stream)
    return stream, vectors


def entering_shape(first_layer: int, num_layers: int, hidden_size: int, rows: int, length: int) -> tuple[int, int, int]:
    """Shape of the hidden states entering a stage that starts at layer `first_layer` (not 0) of the checkpoint."""
    batch_first = first_layer == 1 or first_layer > num_layers + 2
    return (rows, length, hidden_size) if batch_first else (length, rows, hidden_size)
